"""One Site from its statistics to a finding, and to repaired weights: select, solve, shrink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from liar_ext.criteria import CRITERIA, Columns, Evidence, Prior
from liar_ext.engine.clock import Clock
from liar_ext.engine.judgements import Judgements
from liar_ext.engine.level_store import Level
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.ridge import Choice, choose
from liar_ext.errors import InputError, NumericalError
from liar_ext.models import Site
from liar_ext.ops.drift import Drift, Sample
from liar_ext.ops.ladder import LADDER_STEPS
from liar_ext.ops.moments import Moments
from liar_ext.ops.residual import relative_residual_of, residual_energies
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS, Reconstruction, Repaired, Task
from liar_ext.report.schema import SiteReport
from liar_ext.survey import Survey, View


class Repairer:
    """Selects and repairs Sites as a recipe says; ranks share the output rows of a repair.

    Attributes:
        generator: what random criteria draw from, in the order of the Sites.
        prior: by layer and kind, for criteria that need a pass of their own.
    """

    def __init__(
        self,
        recipe: Recipe,
        intercept: dict[str, bool],
        ranks: Ranks,
        clock: Clock,
        judgements: Judgements | None = None,
    ):
        self._recipe, self._intercept, self._ranks, self._clock = recipe, intercept, ranks, clock
        self._criterion = CRITERIA[recipe.criterion]
        if judgements is not None:
            dense = recipe.statistics == "oneshot"
            self._criterion = judgements.of(self._criterion, choices=dense)
        self._reconstruction = RECONSTRUCTIONS[recipe.reconstruct]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.prior: Mapping[tuple[int, str], Prior] = {}

    def finding(
        self, survey: Survey, site: Site, statistics: Columns | None, similarity: float | None
    ) -> tuple[Tensor, list[str]]:
        """What a survey finds of a Site, float64 on the CPU, and what the report should say of it.

        Args:
            statistics, similarity: what the survey reads of them, see `survey.View`.
        """
        if statistics is not None:
            refuse_non_finite(site, statistics)
        evidence = self._evidence(site, statistics)
        with self._clock.phase("solve"):
            found = survey.measure(View(site, self._criterion, evidence, similarity))
        return found.double().cpu(), evidence.notes

    def repair(
        self,
        site: Site,
        moments: Moments,
        notes: Sequence[str],
        kept_units: int,
        *,
        held: Sample | None = None,
        drift: Drift | None = None,
        fits: bool = False,
    ) -> tuple[SiteReport, Callable[[], Tensor]]:
        """Select and solve.

        Args:
            fits: the Site is to make up for more than its own columns, all of it in the drift: by
                least squares whatever the reconstruction.
            held: statistics of those tokens that are held out to choose the ridge by.
            drift: of the Site's output; with it the target is the dense path's.
        Returns:
            the report, and a function that applies the result to the layer and returns the kept
            columns.
        """
        units, columns = site.units, site.columns
        with self._clock.phase("solve"):
            evidence = self._evidence(site, moments, kept_units)
            if kept_units in (0, units):
                # there is nothing to choose, and a criterion may know nothing of this Site
                keep = torch.arange(kept_units, device=moments.gram.device)
            else:
                keep = self._ranks.broadcast(self._criterion.select(evidence))
            kept_columns = site.unit_columns(keep)
            method = RECONSTRUCTIONS["liar"] if fits else self._reconstruction
            repaired, residual, choice = self._solve(
                site, moments, kept_columns, held, drift, method
            )
        bias = _shifted(site.bias(), repaired.shift)
        used = repaired.diagnostics
        report = SiteReport(
            layer=site.layer,
            kind=site.kind,
            name=site.name,
            units_before=units,
            units_after=keep.numel(),
            columns_before=columns,
            columns_after=kept_columns.numel(),
            bias_added=bias is not None and site.bias() is None,
            relative_residual=residual,
            steps=[*notes, *evidence.notes],
            remarks=list(evidence.remarks),
        )
        if choice is not None:
            report.held_out = {f"{ridge:g}": error for ridge, error in choice.errors.items()}
        if used is not None:
            report.ridge, report.ridge_used = used.ridge, used.ridge_used
            report.condition, report.backward_error = used.condition, used.backward_error
            report.dead_columns, report.precision = used.dead, used.precision
            report.iterations = used.iterations
            report.steps += used.steps

        def shrink() -> Tensor:
            with self._clock.phase("solve"):
                dtype = site.weight().dtype
                if not keep.numel() and self._intercept[site.kind]:
                    # what is given biases has one here as well
                    site.add_biases(filler=False)
                site.shrink(keep, repaired.weight, bias)
                if not _finite(repaired.weight, bias, dtype):
                    raise InputError(
                        f"{site.name}: the repaired weights do not fit {dtype}; use "
                        "--dtype bfloat16 or float32, or a larger --ridge"
                    )
            return kept_columns

        return report, shrink

    def selections(
        self, site: Site, moments: Moments, widths: Sequence[int]
    ) -> tuple[list[Tensor], list[str]]:
        """The units that a dense Site keeps at each of these widths, the widest first, and what had
        to be raised for that."""
        with self._clock.phase("solve"):
            # each Site is asked once: there is nothing to remember
            criterion, evidence = CRITERIA[self._recipe.criterion], self._evidence(site, moments)
            some = [units for units in widths if units]
            found = criterion.selections(evidence, some) if some else []
            if not widths[-1]:
                found = [*found, torch.arange(0, device=moments.gram.device)]
            return [self._ranks.broadcast(keep) for keep in found], evidence.notes

    def level(
        self,
        site: Site,
        moments: Moments,
        keep: Tensor,
        notes: Sequence[str] = (),
        *,
        held: Sample | None = None,
    ) -> Level:
        """A dense Site as it would be with these units; it stays as it is.

        Args:
            notes: of the selection and the statistics.
            held: of those tokens that are held out to choose the ridge by.
        """
        with self._clock.phase("solve"):
            repaired, _, _ = self._solve(site, moments, site.unit_columns(keep), held)
            bias, dtype = _shifted(site.bias(), repaired.shift), site.weight().dtype
            steps = () if repaired.diagnostics is None else repaired.diagnostics.steps
            return Level(
                keep,
                repaired.weight.to(dtype),
                None if bias is None else bias.to(dtype),
                (*notes, *steps),
            )

    def _evidence(
        self, site: Site, statistics: Columns | None, keep: int | None = None
    ) -> Evidence:
        prior = self.prior.get((site.layer, site.kind))
        return Evidence(
            site,
            statistics,
            self.generator,
            ridge=self._recipe.first_ridge,
            center=self._intercept[site.kind],
            prior=None if prior is None else prior.to(site.weight().device),
            keep=keep,
        )

    def _solve(
        self,
        site: Site,
        moments: Moments,
        keep: Tensor,
        held: Sample | None = None,
        drift: Drift | None = None,
        method: Reconstruction | None = None,
    ) -> tuple[Repaired, float, Choice | None]:
        """The repaired consumer, its residual, and how its ridge was chosen.

        Each rank solves for its own output rows, or for all of them where rows see each other, and
        measures what its own ones leave.
        """
        reconstruction = method or self._reconstruction
        dropped = torch.ones(site.columns, dtype=torch.bool, device=keep.device)
        dropped[keep] = False
        whole = site.weight()
        outputs = whole.shape[0]
        mine = self._ranks.rows(outputs)
        weight, own = whole[mine], None if drift is None else drift.rows(mine)
        task = Task(
            moments,
            whole if reconstruction.whole else weight,
            keep,
            dropped.nonzero().flatten(),
            self._recipe.first_ridge,
            self._intercept[site.kind],
            outputs,
            site.columns_per_unit,
            own,
        )
        choice = None
        try:
            # what keeps all its columns has nothing to repair, unless its inputs have drifted
            idle = own is None and not task.drop.numel()
            if held is not None and not idle and keep.numel():
                choice = choose(task, held.rows(mine), reconstruction, self._ranks)
                task = replace(task, ridge=choice.ridge)
            if idle:
                part = Repaired(task.weight)
            elif not keep.numel():
                part = _mean_alone(task, repairs=reconstruction is not RECONSTRUCTIONS["none"])
            else:
                part = self._agreed(task, reconstruction)
        except NumericalError as error:
            raise NumericalError(f"{site.name}: {error}") from error
        if reconstruction.whole:
            shift = None if part.shift is None else part.shift[mine]
            part = replace(part, weight=part.weight[mine], shift=shift)
        energies = residual_energies(moments, weight, keep, part.weight, part.shift, own)
        total = torch.tensor(energies, dtype=torch.float64, device=keep.device)
        self._ranks.sum_(total)
        gathered = Repaired(
            self._ranks.gather_rows(part.weight, outputs),
            None if part.shift is None else self._ranks.gather_rows(part.shift, outputs),
            part.diagnostics,
        )
        return gathered, relative_residual_of(total.tolist()), choice

    def _agreed(self, task: Task, method: Reconstruction | None = None) -> Repaired:
        """The rows of this rank, with the same ridge on all ranks.

        The ladder looks at the backward error of the right sides at hand; where that decides, a
        rank may end on another rung than the rest.
        """
        reconstruction = method or self._reconstruction
        part = reconstruction.repair(task)
        steps: tuple[str, ...] = ()
        for _ in range(LADDER_STEPS):
            found = part.diagnostics
            every = self._ranks.gather(None if found is None else found.ridge_used)
            if found is None or len(set(every)) == 1:
                if not steps or found is None:
                    return part
                said = replace(found, ridge=task.ridge, steps=(*steps, *found.steps))
                return replace(part, diagnostics=said)
            highest = max(every)
            steps = (*steps, *found.steps, f"ridge {highest:.1e} for all ranks")
            # a rank may climb again from there: until all agree
            part = reconstruction.repair(replace(task, ridge=highest))
        raise NumericalError(f"ranks find no common ridge: {' | '.join(steps)}")


def refuse_non_finite(site: Site, statistics: Columns) -> None:
    """Raises InputError, naming the Site, for NaN or infinite statistics."""
    bad = ~torch.isfinite(statistics.diagonal())
    if bool(bad.any()):
        raise InputError(
            f"{site.name}: {int(bad.sum())} of {site.columns} input columns have NaN or infinite "
            "activations; check the checkpoint, or compute in a wider type with --dtype"
        )


def _mean_alone(task: Task, *, repairs: bool) -> Repaired:
    """A consumer without columns: where it may have a bias, the mean of what it aims at."""
    weight = task.weight[:, task.keep]
    shift = task.shift(weight) if repairs else None
    if shift is not None and task.drift is not None:
        shift = shift + task.drift.mean()
    return Repaired(weight, shift)


def _finite(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether values stay finite in a dtype."""
    parts = [weight] if bias is None else [weight, bias]
    return all(bool(torch.isfinite(part.to(dtype)).all()) for part in parts)


def _shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if shift is None:
        return None
    return shift if bias is None else bias.double() + shift

"""The one loop: layer by layer, capture, select, repair, shrink; before it a survey, if one is
asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liar_ext.allocation import ALLOCATIONS, Budget, check_reachable
from liar_ext.calibration.batch import Batch
from liar_ext.criteria import CRITERIA
from liar_ext.engine.block import LayerBlock
from liar_ext.engine.budgets import budgets, longest, targeted_layers
from liar_ext.engine.findings import find, learn
from liar_ext.engine.judgements import Judgements
from liar_ext.engine.keeper import Keeper, Position, Widths
from liar_ext.engine.level_store import Key
from liar_ext.engine.measure import Measured
from liar_ext.engine.pairs import PairStream
from liar_ext.engine.passes import PASSES, PriorPass
from liar_ext.engine.paths import paths_for
from liar_ext.engine.repair import Repairer
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.search import Searcher, problem_of, samples_of
from liar_ext.engine.statistics import least_segments
from liar_ext.engine.stream import Feed
from liar_ext.errors import InputError
from liar_ext.models import Site, layout
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report.schema import SiteReport
from liar_ext.survey import Survey, reads_of, survey_of

if TYPE_CHECKING:
    from liar_ext.engine.moments_store import MomentsStore
    from liar_ext.engine.spans import LeftOut


@dataclass
class Driver:
    """State of one compression.

    Attributes:
        batches: calibration tokens; recipe: what to do.
        left_out: layers that are not in the model, whose effect is to be repaired; or None.
        library: Moments of the dense path on disk, read if they are there and kept if not; with
            sequential statistics for the scores of an allocation only.
        keeper: keeps what an interrupted run goes on from.
        judgements: of criteria, shared with other compressions of the same model.
        targets: layers whose widths are pruned; beside: kinds of Sites, by layer, that keep all
            their columns and are fitted as well.
        sites: reports in order, filled by `run`; facts: for the `run` field of the report;
            warnings: for the report, told when they were found.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    recipe: Recipe
    left_out: LeftOut | None = None
    library: MomentsStore | None = None
    keeper: Keeper | None = None
    judgements: Judgements | None = None
    sites: list[SiteReport] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        runtime, recipe, model = self.runtime, self.recipe, self.runtime.model
        self.targets = targeted_layers(runtime.store, recipe)
        biased = layout.biased_kinds(model)
        self.beside = self._beside()
        kinds = dict.fromkeys(recipe.target if recipe.narrows else ())
        kinds |= dict.fromkeys(kind for own in self.beside.values() for kind in own)
        intercept = {kind: self._may_shift(kind in biased) for kind in kinds}
        self.added_biases = [k for k, shift in intercept.items() if shift and k not in biased]
        self._repairer = Repairer(recipe, intercept, runtime.ranks, runtime.clock, self.judgements)
        paths = paths_for(recipe, runtime.adapter, model.config)
        least = least_segments(recipe)
        self._stream = runtime.stream(self.batches, least=least, made=paths.stream)
        if self.left_out is not None:
            assert isinstance(self._stream, PairStream), "see `paths`"
            self._stream.left_out = self.left_out
            self.left_out.start(self.batches, least)
        self._measurer = paths.measurer(
            runtime, recipe, self.targets, self._stream, self.library, self.beside
        )
        self._prior: PriorPass | None = None
        prior = PASSES.get(CRITERIA[recipe.criterion].needs) if recipe.narrows else None
        if prior is not None:
            self._prior = prior(runtime, self.batches, recipe, self.targets)
        self._searcher: Searcher | None = None
        if recipe.narrows and ALLOCATIONS[recipe.allocation].search is not None:
            self._searcher = Searcher(
                runtime,
                self.batches,
                recipe,
                self._measurer,
                self._repairer,
                lambda: self._enter(Position("survey")),
                self.keeper,
                self.judgements,
            )

    @torch.no_grad()
    def run(self) -> None:
        """Prune every targeted Site and close every layer as final.

        With a Keeper that kept something, from there on.
        """
        found = None if self.keeper is None else self.keeper.found()
        position = found or Position("survey")
        if position.generator is not None:
            self._repairer.generator.set_state(position.generator)
        if self._searcher is not None:
            self._searcher.remember()
        if position.stage == "survey" and self.recipe.narrows:
            # before anything is computed that it would be for nothing
            known = self._budgets()
            if (said := self.check(known, samples_of(self.batches))) is not None:
                self.warnings.append(said)
                self.runtime.progress.warn(said)
            if self._searcher is not None:
                self._searcher.check_room(known)
        if self._prior is not None:
            self._repairer.prior = self._prior.results(self.keeper)
            self.facts[self._prior.name] = self._prior.facts
        if position.stage == "survey":
            widths = self._allocate(position) if self.recipe.narrows else {}
            self._repairer.generator.manual_seed(self.recipe.seed)
            position = Position("prune", widths=widths, notes=position.notes)
        if self._searcher is not None:
            self.facts["search"] = self._searcher.facts
        if self.recipe.statistics == "sequential":
            # from here on statistics are of the pruned path, which no library has
            self._measurer.library = None
        self.sites = position.sites
        self.runtime.store.prepare(self._kept(position.widths), self.added_biases, position.layer)
        if self._measurer.needed(position.layer):
            self._enter(position)
        self._catch_up(position)
        self.runtime.progress.begin(len(self.runtime.layers), "pruning", position.layer)
        for index in range(position.layer, len(self.runtime.layers)):
            self.runtime.open(index)
            if index in self.targets or (self._measurer.beside and self._measurer.flows(index)):
                self._shrink_layer(index, position)
            elif self._measurer.flows(index):
                self._measurer.dense(index)
            self._add_biases(index)
            with self.runtime.clock.phase("write"):
                self.runtime.store.close(index, final=True)
            self._keep(position, index + 1)
            self.runtime.progress.layer(index)

    def _enter(self, position: Position) -> None:
        """Hidden states that enter the layer of `position`: embedded, or as they were kept."""
        self._measurer.entered = True
        self.runtime.embed(self._stream)
        if position.layer and self.keeper is not None:
            with self.runtime.clock.phase("hold"):
                self._stream.shelve(self.keeper.hidden(self._stream.batches, self.runtime.device))

    def _kept(self, widths: Widths) -> list[dict[str, int]]:
        """Units of every Site of every layer of the result, as `layout.read` gives them."""
        return [
            {kind: widths.get((index, kind), units) for kind, units in layer.items()}
            for index, layer in enumerate(layout.read(self.runtime.model))
        ]

    def _catch_up(self, position: Position) -> None:
        """Give the layers that an interrupted run has written the shapes that they have there."""
        for index in range(position.layer):
            for site in self.runtime.sites(index, self.recipe.target):
                if (index, site.kind) in position.widths:
                    if site.kind in self.added_biases:
                        site.add_biases(filler=False)
                    site.shrink(torch.arange(position.widths[index, site.kind]))
            self._add_biases(index)

    def _keep(self, position: Position, layer: int) -> None:
        if self.keeper is not None:
            position.layer = layer
            position.generator = self._repairer.generator.get_state()
            with self.runtime.clock.phase("write"):
                self.keeper.keep(position, self._stream.kept())

    def _beside(self) -> dict[int, tuple[str, ...]]:
        """Kinds of Sites by layer that keep all their columns, and are fitted: what stands in for
        layers, and with `--refit all` every Site behind the first change."""
        specs: list[str] = [spec.kind for spec in self.runtime.adapter.sites]
        gaps = self.left_out.gaps if self.left_out is not None else {}
        found = {index: {specs[-1]} for index in gaps}
        changed = [*gaps, *self.targets[:1]]
        if self.recipe.refit == "all" and changed:
            for index in range(min(changed), len(self.runtime.layers)):
                found.setdefault(index, set()).update(specs)
            first = min(changed)
            # in front of the first change there is nothing to make up for
            own = self.recipe.target if first in self.targets else (specs[-1],)
            found[first] -= set(specs[: min(map(specs.index, own))])
        return {
            index: tuple(k for k in specs if k in kinds) for index, kinds in sorted(found.items())
        }

    def _may_shift(self, has_bias: bool) -> bool:
        if RECONSTRUCTIONS[self.recipe.reconstruct].needs_bias or self.recipe.bias == "always":
            return True
        return has_bias and self.recipe.bias == "auto"

    def check(self, known: Mapping[Key, Budget], samples: int) -> str | None:
        """Refuse what the allocation cannot do, before anything is computed.

        Args:
            samples: of the calibration; a search compares models on the first of them.
        Returns:
            what there is to say of how it goes about it, if anything.
        Raises:
            InputError: as `check_reachable`, or as the check of the allocation.
        """
        recipe = self.recipe
        if not recipe.narrows:
            return None
        check_reachable(list(known.values()), recipe.sparsity, recipe.round_to)
        check = ALLOCATIONS[recipe.allocation].check
        if check is None:
            return None
        return check(problem_of(recipe, known, min(samples, recipe.search_samples)))

    def _budgets(self) -> dict[tuple[int, str], Budget]:
        return budgets(self.runtime.store, self.recipe, longest(self.batches))

    def _allocate(self, position: Position) -> Widths:
        """Kept units of every targeted Site; after a survey if the allocation asks for one."""
        allocation, recipe = ALLOCATIONS[self.recipe.allocation], self.recipe
        known = self._budgets()
        survey = survey_of(recipe)
        if survey is not None:
            self._survey(survey, known, position)
            known = {key: replace(known[key], finding=position.findings[key]) for key in known}
        wanted: list[float] | None = None
        if self._searcher is not None:
            position.layer = self.targets.stop
            position.generator = self._repairer.generator.get_state()
            wanted = self._searcher.wanted(allocation, known, position)
        kept = allocation.widths(list(known.values()), recipe.sparsity, recipe.round_to, wanted)
        if all(k == b.units for k, b in zip(kept, known.values(), strict=True)):
            raise InputError(
                f"--sparsity {recipe.sparsity} with --round-to {recipe.round_to} removes "
                "nothing: no smaller width is as close; lower --round-to or raise --sparsity"
            )
        # of what other GPUs found, ranks could make other widths
        return dict(zip(known, self.runtime.ranks.broadcast(kept), strict=True))

    def _survey(self, survey: Survey, budgets: dict[Key, Budget], position: Position) -> None:
        """Findings of every targeted Site on the dense path, from `position` on."""
        reads = reads_of(self.recipe)
        assert reads is not None
        self._measurer.learns = survey.learn is not None
        if self._measurer.needed(position.layer, reads):
            self._enter(position)
        self._stream.keeps = self._measurer.learns
        self.runtime.progress.begin(self.targets.stop, survey.label, position.layer)
        # without tokens nothing has to pass the layers before the first targeted one
        first = self.targets.start if reads == "weights" else 0
        for index in range(max(position.layer, first), self.targets.stop):
            self.runtime.open(index)
            similarity = self._similarity(index) if reads == "states" else None
            found = self._measurer.statistics(index, reads)
            sites = self._measurer.sites(index)
            find(survey, sites, found, similarity, self._repairer, position)
            if survey.learn is not None and sites:
                costs = [budgets[index, site.kind].cost for site in sites]
                learn(survey.learn, LayerBlock(self.runtime, sites, costs, self._stream), position)
            self.runtime.close(index)
            self._keep(position, index + 1)
            self.runtime.progress.layer(index)
        self._stream.keeps = self._measurer.learns = False
        self._measurer.leave()

    def _similarity(self, index: int) -> float:
        found = self._measurer.similarity(index)
        if index in self.targets and not math.isfinite(found):
            raise InputError(
                f"{self.runtime.layer_name(index)}: hidden states are NaN or infinite; check "
                "the checkpoint, or compute in a wider type with --dtype"
            )
        return found

    def _shrink_layer(self, index: int, position: Position) -> None:
        """Prune a layer's Sites; what enters the next is the pruned layer's output if sequential,
        else the dense one's."""
        sites, widths = self._measurer.repaired(index), position.widths
        noted = {site.kind: position.notes.get((index, site.kind), []) for site in sites}
        if self.recipe.statistics == "sequential":

            def visit(site: Site, feed: Feed) -> Tensor:
                before = dict(self.runtime.clock.seconds)
                measured = self._measurer.standing(site, feed)
                units = widths.get((index, site.kind), site.units)
                return self._repair(site, measured, noted[site.kind], units, before)

            self._stream.stopping(index, sites, visit, onward=self._measurer.onward(index))
            return
        before = dict(self.runtime.clock.seconds)
        found = self._measurer.dense(index)
        for site in sites:
            units, notes = widths[index, site.kind], noted[site.kind]
            self._repair(site, found.pop(site.kind), notes, units, before)
            before = dict(self.runtime.clock.seconds)

    def _repair(
        self,
        site: Site,
        measured: Measured,
        notes: list[str],
        kept_units: int,
        before: dict[str, float],
    ) -> Tensor:
        """Repair and shrink a Site; returns the kept columns."""
        notes = [*notes, *measured.notes]
        report, shrink = self._repairer.repair(
            site,
            measured.moments,
            notes,
            kept_units,
            held=measured.held,
            drift=measured.drift,
            fits=site.kind in self._measurer.beside.get(site.layer, ()),
        )
        if self.left_out is not None and site.kind == self.runtime.adapter.sites[-1].kind:
            report.across = list(self.left_out.gaps.get(site.layer, ()))
        report.seconds = {k: self.runtime.clock.seconds[k] - before[k] for k in ("gram", "solve")}
        for note in report.steps:
            self.runtime.progress.warn(f"{site.name}: {note}")
        self.sites.append(report)
        self.runtime.progress.site(report)
        return shrink()

    def _add_biases(self, index: int) -> None:
        """A bias flag of the config holds for all layers and for all linears it names."""
        for site in self.runtime.sites(index, tuple(self.added_biases)):
            site.add_biases(filler=site.spec.bias_flag is not None)

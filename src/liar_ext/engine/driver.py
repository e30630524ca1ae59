"""The one loop: layer by layer, capture, score, select, repair, shrink."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.calibration.batches import Batch
from liar_ext.criteria import CRITERIA, unit_scores
from liar_ext.engine.capture import LayerCall, LayerRun, pausing, record_calls
from liar_ext.engine.clock import Clock
from liar_ext.engine.progress import Progress
from liar_ext.engine.store import LayerStore
from liar_ext.errors import InputError, NumericalError
from liar_ext.models import Site, adapter_for, layout
from liar_ext.ops.gram import gram
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.ops.residual import relative_residual
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS, Repaired, Task
from liar_ext.report.schema import SiteReport

CHUNK_TOKENS = 4096
# mean square over variance, summed over a Site's columns; at 140 the rounding of float32 sums, seen
# from the variances, is the default ridge (`interpolate.ROUNDING`)
CENTRING_LIMIT = 100.0
# (layer, kind) -> kept units
Widths = dict[tuple[int, str], int]
# Site and the consumer inputs of all batches -> the columns the forward goes on with, or None
Visit = Callable[[Site, list[Tensor]], Tensor | None]


def budgets(store: LayerStore, recipe: Recipe) -> dict[tuple[int, str], Budget]:
    """Units and costs of every targeted Site, from shapes alone (works on `meta`)."""
    adapter = adapter_for(store.model.config)
    return {
        (index, site.kind): Budget(site.kind, site.units, site.unit_parameters)
        for index in targeted_layers(store, recipe)
        for site in adapter.sites_of(store.model, index, recipe.target)
    }


def targeted_layers(store: LayerStore, recipe: Recipe) -> range:
    """The layers to prune.

    Raises:
        InputError: `--layers` reaches past the model.
    """
    count = len(adapter_for(store.model.config).layer_list(store.model)[1])
    start, stop = recipe.layers or (0, count)
    if stop > count:
        raise InputError(f"--layers {start}:{stop}: the model has {count} layers (0:{count})")
    return range(start, stop)


@dataclass
class Driver:
    """State of one compression.

    Attributes:
        store: the weights; batches: calibration tokens; recipe: what to do.
        device, progress, clock: where, who watches, how long.
        sites: reports in order, filled by `run`.
    """

    store: LayerStore
    batches: Sequence[Batch]
    recipe: Recipe
    device: torch.device
    progress: Progress
    clock: Clock
    sites: list[SiteReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adapter = adapter_for(self.store.model.config)
        self.criterion = CRITERIA[self.recipe.criterion]
        self.reconstruction = RECONSTRUCTIONS[self.recipe.reconstruct]
        self.targets = targeted_layers(self.store, self.recipe)
        self._layers = self.adapter.layer_list(self.store.model)[1]
        self._generator = torch.Generator().manual_seed(self.recipe.seed)
        self._masks = [
            None if bool(b.attention_mask.all()) else b.attention_mask.flatten().to(self.device)
            for b in self.batches
        ]
        biased = layout.biased_kinds(self.store.model)
        self._intercept = {kind: self._may_shift(kind in biased) for kind in self.recipe.target}
        self.added_biases = [k for k, shift in self._intercept.items() if shift and k not in biased]

    @torch.no_grad()
    def run(self) -> None:
        """Prune every targeted Site and close every layer as final."""
        with self.clock.phase("load"):
            self.store.open_outside()
        hidden, calls = self._embed()
        self.store.close_outside()
        widths = self._allocate(hidden, calls)
        self.progress.begin(len(self._layers), "pruning")
        self._generator.manual_seed(self.recipe.seed)
        for index in range(len(self._layers)):
            self._open(index)
            if index < self.targets.stop:
                later = self._shrink_layer(index, widths, hidden, calls)
                if later is not None:
                    hidden = later
            self._add_biases(index)
            with self.clock.phase("write"):
                self.store.close(index, final=True)
            self.progress.layer(index)

    def _open(self, index: int) -> None:
        """Make a layer available; InputError names a tensor with NaN or infinite weights."""
        with self.clock.phase("load"):
            self.store.open(index)
            for name, parameter in self._layers[index].named_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    path = self.adapter.layer_list(self.store.model)[0]
                    raise InputError(
                        f"{path}.{index}.{name}: has NaN or infinite weights; "
                        "the checkpoint is damaged"
                    )

    def _may_shift(self, has_bias: bool) -> bool:
        if self.reconstruction.needs_bias or self.recipe.bias == "always":
            return True
        return has_bias and self.recipe.bias == "auto"

    def _embed(self) -> tuple[list[Tensor], list[list[LayerCall]]]:
        backbone = self.adapter.backbone(self.store.model)[1]
        options = {"use_cache": False} if self.adapter.decoder else {}
        hidden, calls = [], []
        with self.clock.phase("forward"):
            for batch in self.batches:
                states, recorded = record_calls(backbone, self._layers, batch, self.device, options)
                hidden.append(states)
                calls.append(recorded)
        return hidden, calls

    def _allocate(self, hidden: list[Tensor], calls: list[list[LayerCall]]) -> Widths:
        """Kept units of every targeted Site; one more pass if the allocation needs scores."""
        allocation = ALLOCATIONS[self.recipe.allocation]
        known = budgets(self.store, self.recipe)
        if allocation.needs_scores:
            scores = self._score_all(hidden, calls)
            known = {key: replace(known[key], scores=scores[key]) for key in known}
        kept = allocation.widths(list(known.values()), self.recipe.sparsity, self.recipe.round_to)
        if all(k == b.units for k, b in zip(kept, known.values(), strict=True)):
            raise InputError(
                f"--sparsity {self.recipe.sparsity} with --round-to {self.recipe.round_to} removes "
                "nothing: no smaller width is as close; lower --round-to or raise --sparsity"
            )
        return dict(zip(known, kept, strict=True))

    def _score_all(
        self, hidden: list[Tensor], calls: list[list[LayerCall]]
    ) -> dict[tuple[int, str], Tensor]:
        """Scores of every targeted Site on the dense path, with column statistics only."""
        scores: dict[tuple[int, str], Tensor] = {}

        def visit(site: Site, inputs: list[Tensor]) -> None:
            with self.clock.phase("gram"):
                statistics = ColumnMoments.zeros(site.columns, self.device)
                for x, mask in zip(inputs, self._masks, strict=True):
                    statistics.add(x.reshape(-1, site.columns), mask)
            _refuse_non_finite(site, statistics.squares)
            with self.clock.phase("solve"):
                score = self.criterion.score(site, statistics, self._generator)
                scores[site.layer, site.kind] = score.cpu()

        self.progress.begin(self.targets.stop, "scoring")
        for index in range(self.targets.stop):
            self._open(index)
            later = self._forward(index, hidden, calls, visit)
            hidden = later if later is not None else hidden
            self.store.close(index, final=False)
            self.progress.layer(index)
        return scores

    def _forward(
        self, index: int, hidden: list[Tensor], calls: list[list[LayerCall]], visit: Visit
    ) -> list[Tensor] | None:
        """Run one layer on all batches and let `visit` act at each targeted Site.

        Returns:
            the layer's outputs, or None after the last Site of the last targeted layer, where
            nobody needs them.
        """
        targeted = index in self.targets
        sites = (
            self.adapter.sites_of(self.store.model, index, self.recipe.target) if targeted else []
        )
        runs = [
            LayerRun(self._layers[index], states, recorded[index])
            for states, recorded in zip(hidden, calls, strict=True)
        ]
        try:
            with pausing(sites):
                for site in sites:
                    with self.clock.phase("forward"):
                        inputs = [_expect(run.to_next(), site) for run in runs]
                    columns = visit(site, inputs)
                    del inputs
                    for run in runs:
                        run.keep(columns)
                if index == self.targets.stop - 1:
                    return None
                with self.clock.phase("forward"):
                    return [run.to_next()[1] for run in runs]
        finally:
            for run in runs:
                run.close()

    def _shrink_layer(
        self, index: int, widths: Widths, hidden: list[Tensor], calls: list[list[LayerCall]]
    ) -> list[Tensor] | None:
        """Prune the layer's Sites; the outputs are the pruned layer's if sequential, else dense."""
        sequential = self.recipe.statistics == "sequential"
        postponed: list[Callable[[], Tensor]] = []

        def visit(site: Site, inputs: list[Tensor]) -> Tensor | None:
            shrink = self._repair(site, inputs, widths[index, site.kind])
            if sequential:
                return shrink()
            postponed.append(shrink)
            return None

        outputs = self._forward(index, hidden, calls, visit)
        for shrink in postponed:
            shrink()
        return outputs

    def _repair(self, site: Site, inputs: list[Tensor], kept_units: int) -> Callable[[], Tensor]:
        """Moments, selection and repair of one Site.

        Returns:
            a function that applies the result to the layer and returns the kept columns.
        """
        before = dict(self.clock.seconds)
        units, columns = site.units, site.columns
        moments, notes = self._moments(site, inputs)
        with self.clock.phase("solve"):
            score = unit_scores(site, self.criterion.score(site, moments, self._generator))
            keep = score.argsort(descending=True, stable=True)[:kept_units].sort().values
            kept_columns = site.unit_columns(keep)
            weight = site.weight()
            repaired = self._solve(site, moments, weight, kept_columns)
            residual = relative_residual(
                moments, weight, kept_columns, repaired.weight, repaired.shift
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
            seconds={k: self.clock.seconds[k] - before[k] for k in ("gram", "solve")},
        )
        if used is not None:
            report.ridge, report.ridge_used = used.ridge, used.ridge_used
            report.condition, report.backward_error = used.condition, used.backward_error
            report.dead_columns, report.precision = used.dead, used.precision
            notes += used.steps
        report.steps = notes
        for note in notes:
            self.progress.warn(f"{site.name}: {note}")
        self.sites.append(report)
        self.progress.site(report)

        def shrink() -> Tensor:
            with self.clock.phase("solve"):
                site.shrink(keep, repaired.weight, bias)
                after = site.bias()
                whole = torch.isfinite(site.weight()).all()
                if not bool(whole if after is None else whole & torch.isfinite(after).all()):
                    raise InputError(
                        f"{site.name}: the repaired weights do not fit {weight.dtype}; use "
                        "--dtype bfloat16 or float32, or a larger --ridge"
                    )
            return kept_columns

        return shrink

    def _moments(self, site: Site, inputs: list[Tensor]) -> tuple[Moments, list[str]]:
        """Moments of all batches, in float32 unless centring would lose them.

        Centring subtracts `μμᵀ` from `G/N`; with means 30 times the deviations, 3 digits of
        float32 sums are gone, and with 300 the residual reported was 0.07 for a true 4.0.
        """
        notes: list[str] = []
        for dtype in (torch.float32, torch.float64):
            with self.clock.phase("gram"):
                moments = Moments.zeros(site.columns, dtype=dtype, device=self.device)
                for rows in _chunks(inputs, self._masks):
                    gram(rows, out=moments)
            _refuse_non_finite(site, moments.gram.diagonal())
            squares, variance = moments.diagonal().sum(), moments.variance().sum()
            if float(squares) <= CENTRING_LIMIT * float(variance) or dtype == torch.float64:
                break
            notes.append("means far above the deviations: statistics repeated in float64")
        return moments, notes

    def _solve(self, site: Site, moments: Moments, weight: Tensor, keep: Tensor) -> Repaired:
        dropped = torch.ones(site.columns, dtype=torch.bool, device=keep.device)
        dropped[keep] = False
        task = Task(
            moments,
            weight,
            keep,
            dropped.nonzero().flatten(),
            self.recipe.ridge,
            self._intercept[site.kind],
        )
        if task.drop.numel() == 0:
            return Repaired(weight)
        try:
            return self.reconstruction.repair(task)
        except NumericalError as error:
            raise NumericalError(f"{site.name}: {error}") from error

    def _add_biases(self, index: int) -> None:
        """A bias flag of the config holds for all layers and for all linears it names."""
        for site in self.adapter.sites_of(self.store.model, index, tuple(self.added_biases)):
            site.add_biases(filler=site.spec.bias_flag is not None)


def _chunks(inputs: list[Tensor], masks: list[Tensor | None]) -> Iterator[Tensor]:
    """The valid rows of all batches, at least `CHUNK_TOKENS` at a time but for the last.

    Each Gram call reads and writes all of G and is one more launch: for 1536 columns on one core,
    300 tokens a call took 17 % longer than 1000.
    """
    pending: list[Tensor] = []
    for x, mask in zip(inputs, masks, strict=True):
        rows = x.reshape(-1, x.shape[-1])
        pending.append(rows if mask is None else rows[mask])
        if sum(part.shape[0] for part in pending) >= CHUNK_TOKENS:
            yield torch.cat(pending) if len(pending) > 1 else pending[0]
            pending = []
    if pending:
        yield torch.cat(pending)


def _shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    if shift is None:
        return None
    return shift if bias is None else bias.double() + shift


def _expect(reached: tuple[torch.nn.Module | None, Tensor], site: Site) -> Tensor:
    module, x = reached
    if module is not site.consumer:
        raise RuntimeError(f"the forward pass reached another module before {site.name}")
    return x


def _refuse_non_finite(site: Site, squares: Tensor) -> None:
    bad = ~torch.isfinite(squares)
    if bool(bad.any()):
        raise InputError(
            f"{site.name}: {int(bad.sum())} of {site.columns} input columns have NaN or infinite "
            "activations; check the checkpoint, or compute in a wider type with --dtype"
        )

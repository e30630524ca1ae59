"""The one loop: layer by layer, capture, score, select, repair, shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.calibration.batches import Batch
from liar_ext.criteria import Columns
from liar_ext.engine.clock import Clock
from liar_ext.engine.keeper import Keeper, Position, Widths
from liar_ext.engine.progress import Progress
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.repair import Repairer, refuse_non_finite
from liar_ext.engine.shelf import DeviceShelf, Shelf
from liar_ext.engine.statistics import SiteColumns, SiteMoments
from liar_ext.engine.store import LayerStore
from liar_ext.engine.stream import Feed, Stream
from liar_ext.errors import InputError
from liar_ext.models import Site, adapter_for, layout
from liar_ext.ops.moments import Moments
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report.schema import SiteReport

if TYPE_CHECKING:
    from liar_ext.engine.moments_store import MomentsStore

# mean square over variance, summed over a Site's columns; at 140 the rounding of float32 sums, seen
# from the variances, is the default ridge (`system.ROUNDING`)
CENTRING_LIMIT = 100.0


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
        ranks: the processes that share the work.
        shelf: where hidden states and paused forwards wait.
        library: Moments of the dense path on disk, read if they are there and kept if not.
        keeper: keeps what an interrupted run goes on from.
        sites: reports in order, filled by `run`.
    """

    store: LayerStore
    batches: Sequence[Batch]
    recipe: Recipe
    device: torch.device
    progress: Progress
    clock: Clock
    ranks: Ranks = field(default_factory=Ranks.single)
    shelf: Shelf = field(default_factory=DeviceShelf)
    library: MomentsStore | None = None
    keeper: Keeper | None = None
    sites: list[SiteReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adapter = adapter_for(self.store.model.config)
        self.targets = targeted_layers(self.store, self.recipe)
        self._layers = self.adapter.layer_list(self.store.model)[1]
        # statistics end with the last targeted layer, or the last that other jobs ask for
        self._last = max(
            [self.targets.stop, *(i + 1 for i in range(len(self._layers)) if self._extra(i))]
        )
        biased = layout.biased_kinds(self.store.model)
        self._intercept = {kind: self._may_shift(kind in biased) for kind in self.recipe.target}
        self.added_biases = [k for k, shift in self._intercept.items() if shift and k not in biased]
        self._repairer = Repairer(self.recipe, self._intercept, self.ranks, self.clock)
        self._entered = False
        self._stream = Stream(
            self.batches,
            self._layers,
            device=self.device,
            shelf=self.shelf,
            ranks=self.ranks,
            clock=self.clock,
        )

    @torch.no_grad()
    def run(self) -> None:
        """Prune every targeted Site and close every layer as final.

        With a Keeper that kept something, from there on.
        """
        found = None if self.keeper is None else self.keeper.found()
        position = found or Position("score")
        if position.generator is not None:
            self._repairer.generator.set_state(position.generator)
        if position.stage == "score":
            widths = self._allocate(position)
            self._repairer.generator.manual_seed(self.recipe.seed)
            position = Position("prune", widths=widths)
        self.sites = position.sites
        self.store.prepare(self._kept(position.widths), self.added_biases, position.layer)
        if self._forwards_needed() and position.layer < self._last:
            self._enter(position)
        self._catch_up(position)
        self.progress.begin(len(self._layers), "pruning", position.layer)
        for index in range(position.layer, len(self._layers)):
            self._open(index)
            if index in self.targets:
                self._shrink_layer(index, position.widths)
            elif self._flows(index):
                self._dense(index)
            self._add_biases(index)
            with self.clock.phase("write"):
                self.store.close(index, final=True)
            self._keep(position, index + 1)
            self.progress.layer(index)

    def _forwards_needed(self) -> bool:
        """Whether any statistics are not in the library yet."""
        if self.library is None:
            return True
        sites = [(index, kind) for index in self.targets for kind in self.recipe.target]
        # another job may write there meanwhile: all ranks go by what rank 0 sees
        return self.ranks.broadcast(not self.library.complete(sites))

    def _enter(self, position: Position) -> None:
        """Hidden states that enter the layer of `position`: embedded, or as they were kept."""
        self._entered = True
        with self.clock.phase("load"):
            self.store.open_outside()
        options = {"use_cache": False} if self.adapter.decoder else {}
        self._stream.embed(self.adapter.backbone(self.store.model)[1], options)
        self.store.close_outside()
        if position.layer and self.keeper is not None:
            with self.clock.phase("hold"):
                self._stream.shelve(self.keeper.hidden(self._stream.batches, self.device))

    def _kept(self, widths: Widths) -> list[dict[str, int]]:
        """Units of every Site of every layer of the result, as `layout.read` gives them."""
        return [
            {kind: widths.get((index, kind), units) for kind, units in layer.items()}
            for index, layer in enumerate(layout.read(self.store.model))
        ]

    def _catch_up(self, position: Position) -> None:
        """Give the layers that an interrupted run has written the shapes that they have there."""
        for index in range(position.layer):
            for site in self.adapter.sites_of(self.store.model, index, self.recipe.target):
                if (index, site.kind) in position.widths:
                    site.shrink(torch.arange(position.widths[index, site.kind]))
            self._add_biases(index)

    def _keep(self, position: Position, layer: int) -> None:
        if self.keeper is not None:
            position.layer = layer
            position.generator = self._repairer.generator.get_state()
            with self.clock.phase("write"):
                self.keeper.keep(position, self._stream.hidden)

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
        if RECONSTRUCTIONS[self.recipe.reconstruct].needs_bias or self.recipe.bias == "always":
            return True
        return has_bias and self.recipe.bias == "auto"

    def _allocate(self, position: Position) -> Widths:
        """Kept units of every targeted Site; one more pass if the allocation needs scores."""
        allocation = ALLOCATIONS[self.recipe.allocation]
        known = budgets(self.store, self.recipe)
        if allocation.needs_scores:
            scores = self._score_all(position)
            known = {key: replace(known[key], scores=scores[key]) for key in known}
        kept = allocation.widths(list(known.values()), self.recipe.sparsity, self.recipe.round_to)
        if all(k == b.units for k, b in zip(kept, known.values(), strict=True)):
            raise InputError(
                f"--sparsity {self.recipe.sparsity} with --round-to {self.recipe.round_to} removes "
                "nothing: no smaller width is as close; lower --round-to or raise --sparsity"
            )
        return dict(zip(known, kept, strict=True))

    def _score_all(self, position: Position) -> dict[tuple[int, str], Tensor]:
        """Scores of every targeted Site on the dense path.

        Column statistics are enough for them; where the Moments of the dense path are those of the
        repairs, too, they are kept in the library, and there is no second pass of forwards.
        """
        whole = self.recipe.statistics == "oneshot" and self.library is not None
        if self._forwards_needed() and position.layer < self.targets.stop:
            self._enter(position)
        self.progress.begin(self.targets.stop, "scoring", position.layer)
        for index in range(position.layer, self.targets.stop):
            self._open(index)
            sites = self._sites(index)
            found: dict[str, Columns] = {}
            if whole and self._in_library(index):
                assert self.library is not None
                found |= {
                    s.kind: self.library.load_columns(index, s.kind, self.device) for s in sites
                }
                self._pass_on(index)
            elif whole:
                found |= {kind: moments for kind, (moments, _) in self._dense(index).items()}
            else:
                taps = [(site, SiteColumns(site.columns, self.device)) for site in sites]
                self._stream.advance(self._stream.through(index, taps, onward=self._onward(index)))
                found |= {site.kind: tap.finish(self.ranks) for site, tap in taps}
            for site in sites:
                position.scores[index, site.kind] = self._repairer.score(site, found[site.kind])
            self.store.close(index, final=False)
            self._keep(position, index + 1)
            self.progress.layer(index)
        self._stream.advance({})
        self._entered = False
        return position.scores

    def _sites(self, index: int) -> list[Site]:
        if index not in self.targets:
            return []
        return self.adapter.sites_of(self.store.model, index, self.recipe.target)

    def _flows(self, index: int) -> bool:
        """Whether hidden states go through a layer, on whichever ranks."""
        return self._entered and index < self._last

    def _onward(self, index: int) -> bool:
        """Nobody needs what leaves the last layer that statistics are taken from."""
        return index < self._last - 1

    def _shrink_layer(self, index: int, widths: Widths) -> None:
        """Prune a layer's Sites; what enters the next is the pruned layer's output if sequential,
        else the dense one's."""
        if self.recipe.statistics == "sequential":

            def visit(site: Site, feed: Feed) -> Tensor:
                before = dict(self.clock.seconds)
                moments, notes = self._moments(site, feed)
                return self._repair(site, moments, notes, widths[index, site.kind], before)

            self._stream.stopping(index, self._sites(index), visit, onward=self._onward(index))
            return
        before = dict(self.clock.seconds)
        found = self._dense(index)
        for site in self._sites(index):
            moments, notes = found.pop(site.kind)
            self._repair(site, moments, notes, widths[index, site.kind], before)
            before = dict(self.clock.seconds)

    def _dense(self, index: int) -> dict[str, tuple[Moments, list[str]]]:
        """Moments of a layer's Sites on the dense path, from the library or one forward.

        The hidden states advance, if there are any.
        """
        mine = self._sites(index)
        known: dict[str, tuple[Moments, list[str]]] = {}
        if self.library is not None and self._in_library(index):
            with self.clock.phase("load"):
                for site in mine:
                    moments = self.library.load(index, site.kind, self.device)
                    known[site.kind] = (moments, _notes(moments.gram.dtype))
            self._pass_on(index)
            return known
        kinds = {site.kind for site in mine} | set(self._extra(index))
        sites = self.adapter.sites_of(self.store.model, index, tuple(kinds))
        taps = [(site, self._gram(site, torch.float32)) for site in sites]
        later = self._stream.through(index, taps, onward=self._onward(index))
        for site, tap in taps:
            with self.clock.phase("gram"):
                moments = tap.finish(self.ranks)
            if not self._centred(site, moments):
                again = self._gram(site, torch.float64)
                self._stream.through(index, [(site, again)], onward=False)
                with self.clock.phase("gram"):
                    moments = again.finish(self.ranks)
            if site.kind in self.recipe.target:
                known[site.kind] = (moments, _notes(moments.gram.dtype))
            if self.library is not None:
                with self.clock.phase("write"):
                    if self.ranks.rank == 0:
                        self.library.save(index, site.kind, moments)
                    self.ranks.barrier()
        self._stream.advance(later)
        return known

    def _extra(self, index: int) -> list[str]:
        """Kinds of a layer whose Moments other jobs will ask the library for."""
        if self.library is None:
            return []
        return self.ranks.broadcast(
            [k for k in self.library.wanted(index) if not self.library.has(index, k)]
        )

    def _in_library(self, index: int) -> bool:
        """Whether nothing of a layer has to be measured."""
        if self.library is None:
            return False
        kinds = self.recipe.target if index in self.targets else ()
        extra = self._flows(index) and self._extra(index)
        known = self.ranks.broadcast(all(self.library.has(index, k) for k in kinds))
        return known and not extra

    def _pass_on(self, index: int) -> None:
        """Take the hidden states, if there are any, through a layer as it is."""
        if self._flows(index):
            self._stream.advance(self._stream.through(index, (), onward=self._onward(index)))

    def _moments(self, site: Site, feed: Feed) -> tuple[Moments, list[str]]:
        """Moments of all batches that stand at a Site."""
        moments: Moments | None = None
        for dtype in (torch.float32, torch.float64):
            moments = None  # at 70B widths two of them are 13 GB
            accumulator = self._gram(site, dtype)
            feed(accumulator)
            with self.clock.phase("gram"):
                moments = accumulator.finish(self.ranks)
            del accumulator
            if self._centred(site, moments):
                break
        assert moments is not None
        return moments, _notes(moments.gram.dtype)

    def _gram(self, site: Site, dtype: torch.dtype) -> SiteMoments:
        with self.clock.phase("gram"):
            return SiteMoments(site.columns, self.device, dtype=dtype, alone=self._stream.alone)

    def _centred(self, site: Site, moments: Moments) -> bool:
        """Whether the sums survive centring.

        It subtracts `μμᵀ` from `G/N`; with means 30 times the deviations, 3 digits of float32 sums
        are gone, and with 300 the residual reported was 0.07 for a true 4.0.
        """
        refuse_non_finite(site, moments)
        squares, variance = moments.diagonal().sum(), moments.variance().sum()
        return moments.gram.dtype == torch.float64 or float(squares) <= CENTRING_LIMIT * float(
            variance
        )

    def _repair(
        self,
        site: Site,
        moments: Moments,
        notes: list[str],
        kept_units: int,
        before: dict[str, float],
    ) -> Tensor:
        """Repair and shrink a Site; returns the kept columns."""
        report, shrink = self._repairer.repair(site, moments, notes, kept_units)
        report.seconds = {k: self.clock.seconds[k] - before[k] for k in ("gram", "solve")}
        for note in report.steps:
            self.progress.warn(f"{site.name}: {note}")
        self.sites.append(report)
        self.progress.site(report)
        return shrink()

    def _add_biases(self, index: int) -> None:
        """A bias flag of the config holds for all layers and for all linears it names."""
        for site in self.adapter.sites_of(self.store.model, index, tuple(self.added_biases)):
            site.add_biases(filler=site.spec.bias_flag is not None)


def _notes(dtype: torch.dtype) -> list[str]:
    if dtype == torch.float32:
        return []
    return ["means far above the deviations: statistics repeated in float64"]

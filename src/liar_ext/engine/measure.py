"""Statistics of Sites: from the library, from one forward of the dense path, or where forwards
stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liar_ext.criteria import CRITERIA, Columns
from liar_ext.engine.clock import Clock
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.repair import refuse_non_finite
from liar_ext.engine.statistics import SiteColumns, SiteMoments
from liar_ext.engine.stream import Feed, Stream
from liar_ext.models import Adapter, Site
from liar_ext.ops.drift import Drift
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from liar_ext.engine.moments_store import MomentsStore

# mean square over variance, summed over a Site's columns; at 140 the rounding of float32 sums, seen
# from the variances, is the default ridge (`system.ROUNDING`)
CENTRING_LIMIT = 100.0


@dataclass
class Measured:
    """Attributes: the Moments of a Site, its column statistics where the library has them, the
    drift of its output where there are two paths, notes for the report."""

    moments: Moments
    columns: ColumnMoments | None = None
    drift: Drift | None = None

    @property
    def notes(self) -> list[str]:
        if self.moments.gram.dtype == torch.float32:
            return []
        return ["means far above the deviations: statistics repeated in float64"]


@dataclass
class _Both:
    """One pass fills both: scores of a first pass are the same with and without a library."""

    moments: SiteMoments
    columns: SiteColumns | None

    def add(self, x: Tensor, mask: Tensor | None, segment: int) -> None:
        self.moments.add(x, mask, segment)
        if self.columns is not None:
            self.columns.add(x, mask, segment)


@dataclass
class Measurer:
    """What takes the statistics of one compression.

    Every rank makes the same calls; where the library decides, all go by what rank 0 sees, since
    another job may write there meanwhile.

    Attributes:
        targets: the layers that are pruned.
        library: Moments of the dense path on disk, with `--statistics oneshot` only.
        entered: hidden states are on their way.
    """

    model: PreTrainedModel
    adapter: Adapter
    recipe: Recipe
    targets: range
    stream: Stream
    library: MomentsStore | None
    device: torch.device
    ranks: Ranks
    clock: Clock
    entered: bool = False
    _last: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # statistics end with the last targeted layer, or the last that other jobs ask for
        layers = len(self.adapter.layer_list(self.model)[1])
        asked = [index + 1 for index in range(layers) if self._extra(index)]
        self._last = max([self.targets.stop, *asked])

    def sites(self, index: int) -> list[Site]:
        """The targeted Sites of a layer in forward order."""
        if index not in self.targets:
            return []
        return self.adapter.sites_of(self.model, index, self.recipe.target)

    def needed(self, layer: int) -> bool:
        """Whether hidden states have to go through layers from `layer` on."""
        ahead = range(max(layer, self.targets.start), self.targets.stop)
        if self.library is None or not ahead:
            return len(ahead) > 0
        sites = [(index, kind) for index in ahead for kind in self.recipe.target]
        return bool(self.ranks.broadcast(not self.library.complete(sites)))

    def flows(self, index: int) -> bool:
        """Whether hidden states go through a layer, on whichever ranks."""
        return self.entered and index < self._last

    def onward(self, index: int) -> bool:
        """Nobody needs what leaves the last layer that statistics are taken from."""
        return index < self._last - 1

    def evidence(self, index: int) -> Mapping[str, Columns]:
        """What the criterion needs of a layer's Sites on the dense path; hidden states advance."""
        if CRITERIA[self.recipe.criterion].needs == "moments":
            return {kind: found.moments for kind, found in self.dense(index).items()}
        return self._columns(index)

    def _columns(self, index: int) -> Mapping[str, ColumnMoments]:
        """Column statistics.

        Where the Moments of the dense path are those of the repairs, too, they go to the library
        in the same pass, and there is no second one.
        """
        if self.library is None:
            taps = [(site, SiteColumns(site.columns, self.device)) for site in self.sites(index)]
            self.stream.advance(self.stream.through(index, taps, onward=self.onward(index)))
            return {site.kind: tap.finish(self.ranks) for site, tap in taps}
        if self._in_library(index):
            self._pass_on(index)
            with self.clock.phase("load"):
                return {
                    site.kind: self.library.load_columns(index, site.kind, self.device)
                    for site in self.sites(index)
                }
        measured = self._forward(index)
        return {kind: found.columns for kind, found in measured.items() if found.columns}

    def dense(self, index: int) -> dict[str, Measured]:
        """Moments of a layer's Sites on the dense path, by kind; hidden states advance."""
        if self.library is not None and self._in_library(index):
            self._pass_on(index)
            with self.clock.phase("load"):
                return {
                    site.kind: Measured(self.library.load(index, site.kind, self.device))
                    for site in self.sites(index)
                }
        return self._forward(index)

    def standing(self, site: Site, feed: Feed) -> Measured:
        """Statistics of all batches that stand at a Site."""
        measured = self._standing(site, feed, torch.float32)
        if not self._centred(site, measured.moments):
            del measured  # at 70B widths the two are 10 GB
            measured = self._standing(site, feed, torch.float64)
        return measured

    def _standing(self, site: Site, feed: Feed, dtype: torch.dtype) -> Measured:
        accumulator = self._gram(site, dtype)
        feed(accumulator)
        with self.clock.phase("gram"):
            return Measured(accumulator.finish(self.ranks))

    def _forward(self, index: int) -> dict[str, Measured]:
        """One forward of a layer, with all statistics that anybody asks for."""
        kinds = {site.kind for site in self.sites(index)} | set(self._extra(index))
        sites = self.adapter.sites_of(self.model, index, tuple(kinds))
        taps = [(site, self._both(site)) for site in sites]
        later = self.stream.through(index, taps, onward=self.onward(index))
        measured: dict[str, Measured] = {}
        for site, tap in taps:
            with self.clock.phase("gram"):
                moments = tap.moments.finish(self.ranks)
                columns = None if tap.columns is None else tap.columns.finish(self.ranks)
            if not self._centred(site, moments):
                again = self._gram(site, torch.float64)
                self.stream.through(index, [(site, again)], onward=False)
                with self.clock.phase("gram"):
                    moments = again.finish(self.ranks)
                refuse_non_finite(site, moments)
            self._save(index, site, moments, columns)
            if site.kind in self.recipe.target and index in self.targets:
                measured[site.kind] = Measured(moments, columns)
        self.stream.advance(later)
        return measured

    def _save(
        self, index: int, site: Site, moments: Moments, columns: ColumnMoments | None
    ) -> None:
        if self.library is not None:
            with self.clock.phase("write"):
                if self.ranks.rank == 0:
                    self.library.save(index, site.kind, moments, columns)
                self.ranks.barrier()

    def _both(self, site: Site) -> _Both:
        columns = None if self.library is None else SiteColumns(site.columns, self.device)
        return _Both(self._gram(site, torch.float32), columns)

    def _gram(self, site: Site, dtype: torch.dtype) -> SiteMoments:
        with self.clock.phase("gram"):
            return SiteMoments(site.columns, self.device, dtype=dtype, alone=self.stream.alone)

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

    def _extra(self, index: int) -> Sequence[str]:
        """Kinds of a layer whose Moments other jobs will ask the library for."""
        if self.library is None:
            return []
        missing = [k for k in self.library.wanted(index) if not self.library.has(index, k)]
        return list(self.ranks.broadcast(missing))

    def _in_library(self, index: int) -> bool:
        """Whether nothing of a layer has to be measured."""
        assert self.library is not None
        kinds = self.recipe.target if index in self.targets else ()
        extra = self.flows(index) and self._extra(index)
        there = all(self.library.has(index, kind) for kind in kinds) and not extra
        return bool(self.ranks.broadcast(there))

    def _pass_on(self, index: int) -> None:
        """Take the hidden states, if there are any, through a layer as it is."""
        if self.flows(index):
            self.stream.advance(self.stream.through(index, (), onward=self.onward(index)))

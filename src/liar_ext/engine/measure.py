"""Statistics of Sites: from the library, from one forward of the dense path, or where forwards
stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liar_ext.criteria import Columns
from liar_ext.engine.repair import refuse_non_finite
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.statistics import SiteColumns, SiteMoments, StateSimilarity, held_out
from liar_ext.engine.stream import Comparison, Feed, Stream
from liar_ext.models import Site
from liar_ext.ops.drift import Drift, Sample
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.recipe import Recipe
from liar_ext.survey import Reads

if TYPE_CHECKING:
    from liar_ext.engine.moments_store import MomentsStore

# mean square over variance, summed over a Site's columns; at 140 the rounding of float32 sums, seen
# from the variances, is the default ridge (`system.ROUNDING`)
CENTRING_LIMIT = 100.0


@dataclass
class Measured:
    """Attributes: the Moments of a Site, its column statistics where the library has them, those
    of the tokens that are held out where a ridge is chosen, the drift of its output where there are
    two paths, the dtype that its sums began in, notes for the report."""

    moments: Moments
    columns: ColumnMoments | None = None
    held: Sample | None = None
    drift: Drift | None = None
    first: torch.dtype = torch.float32

    @property
    def notes(self) -> list[str]:
        if self.moments.gram.dtype == self.first:
            return []
        return ["means far above the deviations: statistics repeated in float64"]


def sums_dtype(site: Site) -> torch.dtype:
    """Of a Site's Gram matrix: float32, and float64 for a model that computes in it."""
    return torch.promote_types(site.weight().dtype, torch.float32)


def held_name(kind: str) -> str:
    """What the library calls the Moments of a Site's held-out tokens."""
    return f"{kind}-held-out"


@dataclass
class _Both:
    """One pass fills both: scores of a first pass are the same with and without a library."""

    moments: SiteMoments
    columns: SiteColumns | None

    def add(self, x: Tensor, valid: Tensor | None, segment: int) -> None:
        self.moments.add(x, valid, segment)
        if self.columns is not None:
            self.columns.add(x, valid, segment)


@dataclass
class Measurer:
    """What takes the statistics of one compression.

    Every rank makes the same calls; where the library decides, all go by what rank 0 sees, since
    another job may write there meanwhile.

    Attributes:
        targets: the layers whose widths are pruned.
        beside: kinds of Sites, by layer, that keep all their columns and are fitted as well.
        library: Moments of the dense path on disk, with `--statistics oneshot` only.
        entered: hidden states are on their way.
        learns: what enters and leaves each layer is wanted beside its statistics.
    """

    runtime: Runtime
    recipe: Recipe
    targets: range
    stream: Stream
    library: MomentsStore | None
    beside: Mapping[int, Collection[str]] = field(default_factory=dict)
    entered: bool = False
    learns: bool = False
    _last: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        chooses = self.recipe.chooses_ridge
        self._held_out = held_out(self.stream.count) if chooses else frozenset()
        if chooses and self.stream.count == 1:
            raise RuntimeError("a ridge is chosen on tokens held out, and none are: see `fit_to`")
        # statistics end with the last targeted layer, or the last that other jobs ask for
        layers = len(self.runtime.layers)
        asked = [index + 1 for index in range(layers) if self._extra(index)]
        self._last = max([self.targets.stop, *asked, *(index + 1 for index in self.beside)])

    def sites(self, index: int) -> list[Site]:
        """The targeted Sites of a layer in forward order."""
        return self.runtime.sites(index, self.recipe.target) if index in self.targets else []

    def repaired(self, index: int) -> list[Site]:
        """These, and those `beside` them."""
        kinds = set(self.recipe.target) if index in self.targets else set()
        return self.runtime.sites(index, tuple(kinds | set(self.beside.get(index, ()))))

    def _names(self, kind: str) -> tuple[str, ...]:
        """The files of a Site in the library that this recipe needs."""
        return (kind, held_name(kind)) if self._held_out else (kind,)

    def needed(self, layer: int, reads: Reads = "moments") -> bool:
        """Whether hidden states have to go through layers from `layer` on, for what is read."""
        ahead = range(max(layer, self.targets.start), self.targets.stop)
        if any(index >= layer for index in self.beside):
            return reads != "weights"
        if reads == "weights" or not ahead:
            return False
        if self.library is None or reads == "states" or self.learns:
            return True
        sites = [
            (i, name) for i in ahead for kind in self.recipe.target for name in self._names(kind)
        ]
        return bool(self.runtime.ranks.broadcast(not self.library.complete(sites)))

    def flows(self, index: int) -> bool:
        """Whether hidden states go through a layer, on whichever ranks."""
        return self.entered and index < self._last

    def leave(self) -> None:
        """The hidden states are not needed any more."""
        self.stream.advance({})
        self.entered = False

    def onward(self, index: int) -> bool:
        """Nobody needs what leaves the last layer that statistics are taken from."""
        return index < self._last - 1 or self.learns

    def statistics(self, index: int, reads: Reads) -> dict[str, Columns]:
        """Those of a layer's Sites on the dense path by kind, if any are read; hidden states
        advance."""
        if reads == "moments":
            return {kind: found.moments for kind, found in self.dense(index).items()}
        return dict(self._columns(index)) if reads == "columns" else {}

    def similarity(self, index: int) -> float:
        """Mean cosine of the hidden states on both sides of a layer, which advance.

        Moments that the library is to have are made in the same pass.
        """
        compared = StateSimilarity(self.runtime.device)
        if self.library is None or self._in_library(index):
            self.pass_on(index, compared)
        else:
            self._forward(index, compared)
        return 1.0 - compared.finish(self.runtime.ranks).influence

    def _columns(self, index: int) -> Mapping[str, ColumnMoments]:
        """Column statistics.

        Where the Moments of the dense path are those of the repairs, too, they go to the library
        in the same pass, and there is no second one.
        """
        if self.library is None:
            taps = [
                (site, SiteColumns(site.columns, self.runtime.device)) for site in self.sites(index)
            ]
            self.stream.advance(self.stream.through(index, taps, onward=self.onward(index)))
            return {site.kind: tap.finish(self.runtime.ranks) for site, tap in taps}
        if self._in_library(index):
            self.pass_on(index)
            with self.runtime.clock.phase("load"):
                return {
                    site.kind: self.library.load_columns(index, site.kind, self.runtime.device)
                    for site in self.sites(index)
                }
        measured = self._forward(index)
        return {kind: found.columns for kind, found in measured.items() if found.columns}

    def dense(self, index: int) -> dict[str, Measured]:
        """Moments of a layer's Sites on the dense path, by kind; hidden states advance."""
        if self.library is not None and self._in_library(index):
            self.pass_on(index)
            with self.runtime.clock.phase("load"):
                found: dict[str, Measured] = {}
                for site in self.sites(index):
                    whole, *held = (
                        self.library.load(index, name, self.runtime.device)
                        for name in self._names(site.kind)
                    )
                    found[site.kind] = Measured(
                        whole, held=Sample(held[0]) if held else None, first=sums_dtype(site)
                    )
                return found
        return self._forward(index)

    def standing(self, site: Site, feed: Feed) -> Measured:
        """Statistics of all batches that stand at a Site."""
        first = sums_dtype(site)
        found = self._standing(site, feed, first)
        if not self._centred(site, found.moments):
            del found  # at 70B widths the two are 10 GB
            found = self._standing(site, feed, torch.float64)
        found.first = first
        return found

    def _standing(self, site: Site, feed: Feed, dtype: torch.dtype) -> Measured:
        accumulator = self._gram(site, dtype)
        feed(accumulator)
        return self._finished(accumulator)

    def _finished(self, accumulator: SiteMoments) -> Measured:
        with self.runtime.clock.phase("gram"):
            moments = accumulator.finish(self.runtime.ranks)
            held = accumulator.finish_held(self.runtime.ranks)
            return Measured(moments, held=None if held is None else Sample(held))

    def _forward(self, index: int, compared: Comparison | None = None) -> dict[str, Measured]:
        """One forward of a layer, with all statistics that anybody asks for."""
        kinds = {site.kind for site in self.sites(index)} | set(self._extra(index))
        sites = self.runtime.sites(index, tuple(kinds))
        taps = [(site, self._both(site)) for site in sites]
        later = self.stream.through(index, taps, onward=self.onward(index), compared=compared)
        measured: dict[str, Measured] = {}
        for site, tap in taps:
            found = self._finished(tap.moments)
            with self.runtime.clock.phase("gram"):
                columns = None if tap.columns is None else tap.columns.finish(self.runtime.ranks)
            if not self._centred(site, found.moments):
                again = self._gram(site, torch.float64)
                self.stream.through(index, [(site, again)], onward=False)
                found = self._finished(again)
                refuse_non_finite(site, found.moments)
            found.columns, found.first = columns, sums_dtype(site)
            self._save(index, site, found)
            if site.kind in self.recipe.target and index in self.targets:
                measured[site.kind] = found
        self.stream.advance(later)
        return measured

    def _save(self, index: int, site: Site, found: Measured) -> None:
        if self.library is not None:
            with self.runtime.clock.phase("write"):
                if self.runtime.ranks.rank == 0:
                    self.library.save(index, site.kind, found.moments, found.columns)
                    if found.held is not None:
                        self.library.save(index, held_name(site.kind), found.held.moments)
                self.runtime.ranks.barrier()

    def _both(self, site: Site) -> _Both:
        columns = None if self.library is None else SiteColumns(site.columns, self.runtime.device)
        return _Both(self._gram(site, sums_dtype(site)), columns)

    def _gram(self, site: Site, dtype: torch.dtype) -> SiteMoments:
        with self.runtime.clock.phase("gram"):
            return SiteMoments(
                site.columns,
                self.runtime.device,
                dtype=dtype,
                alone=self.stream.alone,
                held_out=self._held_out,
            )

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
        return list(self.runtime.ranks.broadcast(missing))

    def _in_library(self, index: int) -> bool:
        """Whether nothing of a layer has to be measured."""
        assert self.library is not None
        kinds = self.recipe.target if index in self.targets else ()
        extra = self.flows(index) and self._extra(index)
        names = [name for kind in kinds for name in self._names(kind)]
        there = all(self.library.has(index, name) for name in names) and not extra
        return bool(self.runtime.ranks.broadcast(there))

    def pass_on(self, index: int, compared: Comparison | None = None) -> None:
        """Take the hidden states, if there are any, through a layer as it is."""
        if self.flows(index):
            onward = self.onward(index)
            self.stream.advance(self.stream.through(index, (), onward=onward, compared=compared))

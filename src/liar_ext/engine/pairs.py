"""Two paths of the same tokens, for a target that is the dense model's: the pruned one, which goes
from Site to Site as ever, and beside it the dense one.

Up to the first layer that is pruned they are one. From there on a layer gets the dense states
first, while its weights are still the dense ones: a batch goes through in one go, and what each
Site's consumer says waits on the shelf until the pruned path stands there. So nothing of the dense
path is paused, and each layer is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liar_ext.engine.calls import layer_output
from liar_ext.engine.capture import listening
from liar_ext.engine.measure import Measured, Measurer
from liar_ext.engine.repair import refuse_non_finite
from liar_ext.engine.shelf import Item, free_all
from liar_ext.engine.statistics import SitePairs
from liar_ext.engine.stream import Accumulator, Feed, Stream, Visit
from liar_ext.errors import InputError
from liar_ext.models import Site

if TYPE_CHECKING:
    from liar_ext.engine.spans import LeftOut

# what the name of a dense state in a snapshot ends with
DENSE = "-dense"


class PairStream(Stream):
    """Hidden states of both paths.

    Attributes:
        dense: those of the dense path by the number of the batch, once the paths have parted.
        left_out: layers of the dense path that the pruned one has not, if there are any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dense: dict[int, Item] = {}
        self.left_out: LeftOut | None = None
        self._outputs: dict[tuple[str, int], Item] = {}

    def parted(self, index: int) -> bool:
        """Whether there are two paths at a layer."""
        return True

    def advance(self, later: Mapping[int, Item]) -> None:
        """Both paths become `later`: they are one."""
        super().advance(later)
        self._part({})

    def kept(self) -> dict[str, Item]:
        return super().kept() | {f"{n}{DENSE}": item for n, item in self.dense.items()}

    def shelve(self, states: Iterable[tuple[str, Tensor]]) -> None:
        own: dict[int, Item] = {}
        dense: dict[int, Item] = {}
        for name, tensor in states:
            path = dense if name.endswith(DENSE) else own
            path[int(name.removesuffix(DENSE))] = self._shelf.put(tensor)
        self.advance(own)
        self._part(dense)

    def through(self, *args: Any, **kwargs: Any) -> dict[int, Item]:
        # where this is used, layers before the first that is pruned, there is one path
        assert not self.dense, "the paths have parted"
        return super().through(*args, **kwargs)

    def stopping(self, index: int, sites: Sequence[Site], visit: Visit, *, onward: bool) -> None:
        def visit_and_forget(site: Site, feed: Feed) -> Tensor | None:
            columns = visit(site, feed)
            self._forget(site.kind)
            return columns

        try:
            later = self._ahead(index, sites, onward=onward)
            super().stopping(index, sites, visit_and_forget, onward=onward)
            self._part(later)
        finally:
            for site in sites:
                self._forget(site.kind)

    def _ahead(self, index: int, sites: Sequence[Site], *, onward: bool) -> dict[int, Item]:
        """The dense path through a layer that is still dense; what Sites aim at waits."""
        layer, heeded = self._layers[index], self._heeded(sites)
        later: dict[int, Item] = {}
        gap = self.left_out is not None and index in self.left_out.gaps
        for number in self._batches:
            before = self.dense.get(number, self.hidden[number])
            with listening(heeded) as heard, self._clock.phase("forward"):
                states = layer_output(layer, before.fetch(), self._calls[number][index])
            if len(heard) != len(heeded):
                raise RuntimeError(f"a forward of layer {index} did not reach all of its Sites")
            with self._clock.phase("hold"):
                for kind, target in self._targets(number, sites, heard).items():
                    self._outputs[kind, number] = self._shelf.put(target)
                if onward or gap:
                    later[number] = self._shelf.put(states)
                if number in self.dense:
                    self.dense.pop(number).free()
            del states
        if gap:
            later = self._across(index, sites[-1].kind, later)
        if onward:
            return later
        free_all(later)
        return {}

    def _across(self, index: int, kind: str, before: dict[int, Item]) -> dict[int, Item]:
        """The dense path behind the layers that are left out behind `index`.

        What they add goes on top of what the last Site in front of them aims at.
        """
        assert self.left_out is not None, "there is a gap"
        behind = self.left_out.through(index, before)
        for number, item in behind.items():
            with self._clock.phase("hold"):
                waiting = self._outputs[kind, number]
                target = waiting.fetch()
                added = (wide(item.fetch()) - wide(before[number].fetch())) / self._scale
                total = (wide(target) + added.view_as(target)).to(target.dtype)
                waiting.free()
                before[number].free()
                self._outputs[kind, number] = self._shelf.put(total)
        return behind

    def _heeded(self, sites: Sequence[Site]) -> Sequence[Site]:
        """The Sites of the layer whose outputs make the targets of `sites`."""
        return sites

    def _targets(
        self, number: int, sites: Sequence[Site], heard: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """What each of the Sites aims at, by kind, from what the dense path said on a batch."""
        return heard

    def _hand(self, accumulator: Accumulator, site: Site, number: int, x: Tensor) -> None:
        if not isinstance(accumulator, SitePairs):
            # at a layer where there is one path
            super()._hand(accumulator, site, number, x)
            return
        with self._clock.phase("forward"):
            dense = self._outputs[site.kind, number].fetch()
            local = site.consumer(x)
        with self._clock.phase("gram"):
            accumulator.add_pair(
                x, local, dense, self.valid(number, site.layer), self._segments[number]
            )

    def _part(self, dense: Mapping[int, Item]) -> None:
        free_all(self.dense)
        self.dense = dict(dense)

    def _forget(self, kind: str) -> None:
        """Free the targets of a Site."""
        for key in [key for key in self._outputs if key[0] == kind]:
            self._outputs.pop(key).free()


class PairMeasurer(Measurer):
    """Statistics of Sites where both paths are known."""

    def _standing(self, site: Site, feed: Feed, dtype: torch.dtype) -> Measured:
        assert isinstance(self.stream, PairStream), "see `paths`"
        if not self.stream.parted(site.layer):
            return super()._standing(site, feed, dtype)
        with self.runtime.clock.phase("gram"):
            accumulator = SitePairs(
                site.weight().shape[0],
                site.columns,
                self.runtime.device,
                dtype=dtype,
                alone=self.stream.alone,
                held_out=self._held_out,
            )
        feed(accumulator)
        with self.runtime.clock.phase("gram"):
            whole = accumulator.finish_pair(self.runtime.ranks)
            held = accumulator.finish_held_pair(self.runtime.ranks)
        moments, drift = whole.moments, whole.drift
        assert drift is not None, "of pairs"
        refuse_non_finite(site, moments)
        bad = ~torch.isfinite(drift.dense.squares + drift.change.squares)
        if bool(bad.any()):
            raise InputError(
                f"{site.name}: {int(bad.sum())} of {bad.numel()} outputs are NaN or infinite on "
                "the dense or the pruned path; compute in a wider type with --dtype"
            )
        return Measured(moments, held=held, drift=drift)


def wide(values: Tensor) -> Tensor:
    """In at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

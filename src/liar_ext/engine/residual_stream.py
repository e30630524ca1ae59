"""Two paths of the same tokens, for a target that is the dense model's residual stream.

In a layer with norms in front (pre-norm) the stream behind a Site's addition is the layer's input
and the outputs of the layer's consumers up to that one. The Site aims at

    t = (r + W x + b) − r̂

with r, r̂ the stream in front of its addition on the dense and the pruned path. When the dense path
has gone through a layer, `r − r̂` at the layer's input and the dense outputs up to each Site are on
the shelf, one tensor for each Site; what the pruned path's consumers say is taken off it as the
runs pass them. So r and r̂, which may be large where t is not, are never rounded apart. Where a
layer multiplies what its consumers say by s before it adds it (Granite), r − r̂ is divided by s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from liar_ext.engine.capture import listening
from liar_ext.engine.pairs import PairStream, wide
from liar_ext.engine.stream import Accumulator, Visit
from liar_ext.models import Site


class ResidualStream(PairStream):
    """Hidden states of both paths; a Site's target has the drift of the stream beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # what consumers in front of the present Site said in the run that is passing, by kind
        self._said: dict[str, Tensor] = {}

    def stopping(self, index: int, sites: Sequence[Site], visit: Visit, *, onward: bool) -> None:
        earlier = self._heeded(sites)[:-1]
        with listening(earlier, runs_only=True) as self._said:
            super().stopping(index, sites, visit, onward=onward)

    def _heeded(self, sites: Sequence[Site]) -> Sequence[Site]:
        """All Sites of the layer up to the last of these, in the order of a forward."""
        if not sites:
            return []
        kinds = [spec.kind for spec in self._specs]
        last = max(kinds.index(site.kind) for site in sites)
        return [replace(sites[0], spec=spec) for spec in self._specs[: last + 1]]

    def _targets(
        self, number: int, sites: Sequence[Site], heard: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        total: Tensor | None = None
        if number in self.dense:
            total = wide(self.dense[number].fetch()) - wide(self.hidden[number].fetch())
            total /= self._scale
        targets: dict[str, Tensor] = {}
        kinds = {site.kind for site in sites}
        for site in self._heeded(sites):
            output = heard[site.kind]
            # OPT's FFN has no batches: (b·t, d)
            own = wide(output)
            total = own if total is None else total.view_as(output) + own
            if site.kind in kinds:
                targets[site.kind] = total.to(output.dtype)
        return targets

    def _hand(self, accumulator: Accumulator, site: Site, number: int, x: Tensor) -> None:
        # not when a run is asked for its input again: it has said nothing since
        while self._said:
            with self._clock.phase("hold"):
                self._take_off(number, self._said.popitem()[1])
        super()._hand(accumulator, site, number, x)

    def _take_off(self, number: int, output: Tensor) -> None:
        """From all targets of a batch that still wait, which are of Sites behind."""
        for key in [key for key in self._outputs if key[1] == number]:
            item = self._outputs[key]
            target = item.fetch()
            rest = (wide(target) - wide(output).view_as(target)).to(target.dtype)
            item.free()
            self._outputs[key] = self._shelf.put(rest)

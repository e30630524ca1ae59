"""A dense layer with gates on its Sites: how far its output moves, and which way the gates pull."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from liar_ext.engine.calls import layer_output
from liar_ext.engine.frozen import frozen
from liar_ext.engine.gates import Gates, gated
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.statistics import valid_rows
from liar_ext.engine.stream import Stream
from liar_ext.errors import InputError
from liar_ext.models import Site
from liar_ext.survey.base import Trial

T = TypeVar("T")

# a channel whose mean square is less is left out: its inverse, and squares beside it, are to be
# float32 with all their digits
_LEAST = 1e4 * torch.finfo(torch.float32).tiny


class LayerBlock:
    """`survey.Block` of a layer: the stream holds what entered it and what left it.

    The error of an output ŷ is the mean over channels of its squared error relative to the channel,

        E = 1/d Σ_c ( Σ_t (y_tc − ŷ_tc)² / Σ_t y_tc² )

    over valid tokens t; of one batch with the channel's mean square over all batches below.

    A batch is one rank's, and what ranks know of batches is put together in their order: the same
    bits on any number of ranks. Channels in which the dense output is zero throughout are left out,
    or so near to it (mean squares below 1.2e-34) that float32 cannot divide by it.

    Args:
        sites: of one layer, which is open. costs: of one unit of each of them.
    Raises:
        InputError: what leaves the layer is NaN or infinite; later, what leaves it with gates.
    """

    def __init__(
        self,
        runtime: Runtime,
        sites: Sequence[Site],
        costs: Sequence[float],
        stream: Stream,
    ) -> None:
        self.units: Sequence[int] = [site.units for site in sites]
        self.costs, self.batches = costs, stream.total
        self._layer, self.sites = runtime.layers[sites[0].layer], sites
        self._stream, self._device = stream, runtime.device
        self._ranks, self._clock = ranks, clock = runtime.ranks, runtime.clock
        self._name = runtime.layer_name(sites[0].layer)
        own: dict[int, tuple[int, Tensor]] = {}
        for number in stream.batches:
            with clock.phase("hold"):
                states = stream.hidden[number].fetch()
            with clock.phase("forward"):
                rows = self._rows(number, states).double()
                own[number] = len(rows), rows.square().sum(0).cpu()
        every = _in_order(ranks.gather(own))
        self._tokens = [tokens for tokens, _ in every]
        squares = sum((part for _, part in every[1:]), every[0][1]) / max(sum(self._tokens), 1)
        if not bool(torch.isfinite(squares).all()):
            raise InputError(
                f"{self._name}: hidden states are NaN or infinite; check the checkpoint, or "
                "compute in a wider type with --dtype"
            )
        weights = torch.where(squares > _LEAST, 1 / squares.clamp(min=_LEAST), 0.0) / len(squares)
        self._weights = weights.to(runtime.device, torch.float32)

    def slopes(self, trials: Sequence[Trial]) -> list[list[Tensor]]:
        found: dict[int, list[Tensor]] = {}
        with frozen(self._layer), gated(self.sites) as gates:
            for place, (number, values) in enumerate(trials):
                if number not in self._stream.entered:
                    continue
                leaves = [value.to(self._device).float().requires_grad_() for value in values]
                gates.values = leaves
                with torch.enable_grad():
                    error = self._of_batch(number, "backward") / max(self._tokens[number], 1)
                with self._clock.phase("backward"):
                    own = torch.autograd.grad(error, leaves)
                    found[place] = [gradient.double().cpu() for gradient in own]
                    del error
        every = _in_order(self._ranks.gather(found))
        self._check(all(bool(own.isfinite().all()) for of in every for own in of))
        return every

    def errors(self, gates: Sequence[Sequence[Tensor]]) -> list[float]:
        own: dict[int, list[float]] = {}
        with gated(self.sites) as opened:
            for number in self._stream.batches:
                own[number] = [self._value(number, opened, values) for values in gates]
        every = _in_order(self._ranks.gather(own))
        total = max(sum(self._tokens), 1)
        found = [sum(of_batch[place] for of_batch in every) / total for place in range(len(gates))]
        self._check(all(map(isfinite, found)))
        return found

    def _check(self, finite: bool) -> None:
        """What is found is the same on every rank, and so is whether it is refused."""
        if not finite:
            raise InputError(
                f"{self._name}: with units removed, the error of what leaves the layer is NaN or "
                "infinite; compute in a wider type with --dtype"
            )

    def _value(self, number: int, opened: Gates, values: Sequence[Tensor]) -> float:
        opened.values = [value.to(self._device) for value in values]
        return float(self._of_batch(number, "forward"))

    def _rows(self, number: int, states: Tensor) -> Tensor:
        """The valid tokens that the layer reads, (tokens, d)."""
        index = self.sites[0].layer
        own = self._stream.own(number, index, states)
        return valid_rows(own, self._stream.valid(number, index))

    def _of_batch(self, number: int, phase: str) -> Tensor:
        """The error summed over a batch's tokens, float64, with the gates that are on."""
        stream = self._stream
        with self._clock.phase("hold"):
            entering, leaving = stream.entered[number].fetch(), stream.hidden[number].fetch()
        with self._clock.phase(phase):
            output = layer_output(self._layer, entering, stream.call(number, self.sites[0].layer))
            change = self._rows(number, output).float() - self._rows(number, leaving).float()
            return (change.square() @ self._weights).sum(dtype=torch.float64)


def _in_order(parts: Sequence[dict[int, T]]) -> list[T]:
    """What ranks have each under a number, together by number."""
    whole = {number: value for part in parts for number, value in part.items()}
    return [whole[number] for number in sorted(whole)]

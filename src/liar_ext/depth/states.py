"""How little spans of layers turn their hidden states: one pass over the model, layer by layer.

What leaves the last layer is compared as the layer leaves it, in front of the model's final norm
(`hidden_states[-1]` of transformers is behind it, and would make the last span look worse).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.calibration.batches import Batch
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item
from liar_ext.engine.statistics import MOST_SEGMENTS, valid_rows


@dataclass(frozen=True)
class Turn:
    """How a span of layers turns its hidden states, means over the valid tokens.

    Attributes: `influence`, 1 − cosine of what enters and leaves, 0 to 2; `angle` between them over
    π, 0 to 1.
    """

    influence: float
    angle: float


class Turning:
    """Accumulates a `Turn`; by segment, so that the sums are the same on any number of ranks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, MOST_SEGMENTS, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, before: Tensor, after: Tensor, valid: Tensor | None, segment: int) -> None:
        """Accumulate the valid rows of both (..., d)."""
        entering, leaving = (valid_rows(states, valid).float() for states in (before, after))
        cosines = torch.cosine_similarity(entering, leaving, dim=-1).clamp_(-1, 1)
        angles = cosines.acos() / math.pi
        self._sums[0, segment] += (1 - cosines).sum(dtype=torch.float64)
        self._sums[1, segment] += angles.sum(dtype=torch.float64)
        self._count += cosines.numel()

    def finish(self, ranks: Ranks) -> Turn:
        """Of all batches of all ranks."""
        ranks.sum_(self._sums)
        ranks.sum_(self._count)
        influence, angle = (self._sums.sum(1) / self._count.clamp(min=1)).tolist()
        return Turn(influence, angle)


@torch.no_grad()
def turns(
    runtime: Runtime, batches: Sequence[Batch], spans: Sequence[int]
) -> dict[int, list[Turn]]:
    """Of every span of so many layers, by its length and then by its first layer.

    The states that enter the last `max(spans)` layers wait on the shelf, no others.

    Args:
        spans: lengths, 1 to the number of layers.
    """
    stream = runtime.stream(batches)
    runtime.embed(stream)
    layers, longest = len(runtime.layers), max(spans)
    found: dict[int, list[Turn]] = {span: [] for span in spans}
    # what entered the layers up to the present one, the last of them last
    entered: deque[Mapping[int, Item]] = deque()
    runtime.progress.begin(layers, "comparing hidden states")
    for index in range(layers):
        runtime.open(index)
        later = stream.through(index, (), onward=True)
        runtime.close(index)
        entered.append(stream.hidden)
        for span in spans:
            if span <= len(entered):
                turning = Turning(runtime.device)
                for number in stream.batches:
                    with runtime.clock.phase("hold"):
                        before, after = entered[-span][number].fetch(), later[number].fetch()
                    with runtime.clock.phase("gram"):
                        turning.add(before, after, stream.valid(number), stream.segment(number))
                found[span].append(turning.finish(runtime.ranks))
        if len(entered) == longest:
            _free(entered.popleft())
        stream.hidden = later
        runtime.progress.layer(index)
    for states in entered:
        _free(states)
    stream.advance({})
    return found


def _free(states: Mapping[int, Item]) -> None:
    for item in states.values():
        item.free()

"""Seconds of every segment on this device, and of whole networks, measured by turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.bench.measure import interleave
from liar_ext.convolution.chain import Chain, Segment
from liar_ext.convolution.network import Merged, Shape, shape_of, shortcut_shape

# rounds between two entries of the journal
ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """Something that is timed once, wherever a network has it.

    Attributes:
        shape: of the convolution, or of the shortcut where `sum`; None for the identity.
        size: (channels, h, w) of its input.
        sum: a shortcut and the addition that a residual block ends with.
    """

    shape: Shape | None
    size: tuple[int, ...]
    sum: bool = False

    @property
    def name(self) -> str:
        """The same for the same work, in this run and in another one."""
        parts = {} if self.shape is None else asdict(self.shape)
        told = ",".join(f"{key}={value}" for key, value in parts.items())
        return f"{'sum' if self.sum else 'conv'} {'x'.join(map(str, self.size))} {told}".strip()


def works_of(chain: Chain, segment: Segment, sizes: Mapping[int, tuple[int, ...]]) -> list[Work]:
    """What a segment costs: its convolution with the activation, and where it ends a block of which
    activations stay inside, the shortcut and the sum. The identity costs nothing."""
    shape = shape_of(chain, segment)
    found = []
    if not (shape.empty and shape.activation is None):
        found.append(Work(shape, sizes[segment.start]))
    block = chain.inside(segment)
    if block is not None and block.end == segment.end:
        own = None if block.shortcut is None else shortcut_shape(block.shortcut)
        found.append(Work(own, sizes[block.start], sum=True))
    return found


def call_of(work: Work, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """Run it on random values."""
    x = torch.randn(batch, *work.size, device=device, dtype=dtype)
    module = None if work.shape is None else Merged(work.shape).to(device, dtype).eval()
    with torch.no_grad():
        other = (x if module is None else module(x)).clone()

    def call() -> Any:
        with torch.no_grad():
            made = x if module is None else module(x)
            return made + other if work.sum else made

    return call


def network_call(model: PreTrainedModel, size: Sequence[int], batch: int) -> Callable[[], Any]:
    """A forward of a whole network on random images (channels, h, w)."""
    first = next(model.parameters())
    x = torch.randn(batch, *size, device=first.device, dtype=first.dtype)

    def call() -> Any:
        with torch.no_grad():
            return model(pixel_values=x).logits

    return call


def measure_networks(
    models: Mapping[str, PreTrainedModel], size: Sequence[int], batch: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward of each, by turns."""
    device = next(next(iter(models.values())).parameters()).device
    calls = {name: network_call(model, size, batch) for name, model in models.items()}
    return interleave(calls, rounds, device)


def seconds_of(works: Sequence[Work], samples: Mapping[str, Sequence[float]]) -> float:
    """The sum of medians."""
    return sum(median(samples[work.name]) for work in works)

"""Logits of a language-model head, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liar_ext.models import linear

# float32 logits of one chunk: 128 MiB; 2048 positions of a vocabulary of 128k take 1 GiB
CHUNK_LOGITS = 1 << 25


@dataclass(frozen=True)
class Shape:
    """What a family makes of its output embedding's y: `bound · tanh(scale · y / bound)`.

    Attributes:
        scale: 1 is none; bound: None is none.
    """

    scale: float = 1.0
    bound: float | None = None

    def __call__(self, y: Tensor) -> Tensor:
        """Of `y`, which is written to; with a bound in a second tensor."""
        if self.scale != 1:
            y = y.mul_(self.scale)
        # the gradient of tanh needs what it gave
        return y if self.bound is None else y.div_(self.bound).tanh_() * self.bound


PLAIN = Shape()


class ShapedHead(nn.Module):
    """An output embedding and what its family makes of what it says; for `logits`."""

    def __init__(self, head: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.head, self.shape = head, shape

    @property
    def weight(self) -> Tensor:
        return linear.weight(self.head)


def shaped(head: nn.Module, shape: Shape) -> nn.Module:
    """The module that makes logits of last hidden states."""
    return head if shape == PLAIN else ShapedHead(head, shape)


def chunks(head: nn.Module, positions: int) -> Iterator[slice]:
    """Positions whose logits are made together."""
    step = max(1, CHUNK_LOGITS // linear.weight(head).shape[0])
    for start in range(0, positions, step):
        yield slice(start, start + step)


def logits(head: nn.Module, states: Tensor) -> Tensor:
    """(tokens, vocabulary) of states (tokens, d), float32 at least."""
    own, shape = (head.head, head.shape) if isinstance(head, ShapedHead) else (head, PLAIN)
    found = own(states)
    return shape(found.to(torch.promote_types(found.dtype, torch.float32)))

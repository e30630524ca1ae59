"""Logits of a language-model head, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liar_ext.models import linear

# float32 logits of one chunk: 128 MiB; 2048 positions of a vocabulary of 128k take 1 GiB
CHUNK_LOGITS = 1 << 25


def chunks(head: nn.Module, positions: int) -> Iterator[slice]:
    """Positions whose logits are made together."""
    step = max(1, CHUNK_LOGITS // linear.weight(head).shape[0])
    for start in range(0, positions, step):
        yield slice(start, start + step)


def logits(head: nn.Module, states: Tensor) -> Tensor:
    """(tokens, vocabulary) of states (tokens, d), float32 at least."""
    found = head(states)
    return found.to(torch.promote_types(found.dtype, torch.float32))

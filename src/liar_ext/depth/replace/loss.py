"""What hidden states cost that are not those that were wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.recovery.train import Loss


def state_error(
    found: Tensor, wanted: Tensor, valid: Tensor | None, *, normalised: bool = False
) -> Loss:
    """`Σ_t w_t ‖found_t − wanted_t‖²` over valid tokens, of as many terms as these have elements.

    w is 1, or with `normalised` `1 / mean(wanted_t²)` (1 where that is 0): a few tokens (the first
    one of a text) have states a hundred times as large as all others, and plain squares are their
    errors.

    Args:
        found, wanted: (b, t, d), any float dtype; computed in float32 at least.
        valid: see `Batch.valid_on`.
    Source:
        LLM-Streamline (Chen et al., 2024, arXiv 2403.19135), its MSE loss; `normalised` is ours.
    """
    exact = torch.promote_types(found.dtype, torch.float32)
    error = (found.to(exact) - wanted.to(exact)).flatten(0, 1)
    target = wanted.to(exact).flatten(0, 1)
    if valid is not None:
        error, target = error[valid], target[valid]
    squares = error.square().sum(1)
    if normalised:
        size = target.square().mean(1)
        # a state of zeros has no size to measure by
        squares = squares / torch.where(size > 0, size, torch.ones_like(size))
    return Loss(squares.sum(), error.numel())


def state_error_reference(
    found: Tensor, wanted: Tensor, mask: Tensor, *, normalised: bool = False
) -> float:
    """The definition per term: float64, a token at a time.

    Args:
        mask: (b, t), True for valid tokens.
    """
    total, terms = 0.0, 0
    for row, column in mask.nonzero().tolist():
        own, target = found[row, column].double(), wanted[row, column].double()
        error = float((own - target).square().sum())
        size = float(target.square().mean()) if normalised else 1.0
        total += error / (size or 1.0)
        terms += own.numel()
    return total / terms

"""What a pruned consumer gets wrong, from Moments alone: `E‖(W'x_S + b') − (Wx + b)‖²`."""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops.moments import Moments

COLUMN_BLOCK = 512


def residual_reference(
    x: Tensor, weight: Tensor, keep: Tensor, new_weight: Tensor, shift: Tensor | None = None
) -> float:
    """The definition, on raw activations `x` (T, n) in float64.

    Mean squared output error over the mean squared deviation of the dense output from its mean.
    """
    x, weight = x.double(), weight.double()
    error = x[:, keep] @ new_weight.double().T - x @ weight.T
    if shift is not None:
        error = error + shift.double()
    dense = (x - x.mean(0)) @ weight.T
    return float(error.square().sum() / dense.square().sum())


def relative_residual(
    moments: Moments, weight: Tensor, keep: Tensor, new_weight: Tensor, shift: Tensor | None = None
) -> float:
    """The same from Moments, for any reconstruction.

    With `D = [W'_S − W_S | −W_M]` and δ = b' − b:
    `E‖Dx + δ‖² = tr(D (G/N) Dᵀ) + 2 δᵀDμ + ‖δ‖²`, over `tr(W C Wᵀ)`.

    Args:
        weight: dense consumer weight (out, n); new_weight: (out, |S|); shift: δ (out,) or None.
    Returns:
        0 for a perfect repair, 1 for a consumer that outputs only its mean.
    """
    weight = weight.double()
    difference = -weight
    difference[:, keep] += new_weight.double()
    mean = moments.mean()
    error = _second_trace(moments, difference)
    if shift is not None:
        shift = shift.double()
        error += float(2 * shift @ (difference @ mean) + shift.square().sum())
    second = _second_trace(moments, weight)
    # an output that does not vary has no residual to compare with: its rounding stands in
    rounding = torch.finfo(moments.gram.dtype).eps * second + torch.finfo(torch.float64).tiny
    dense = second - float((weight @ mean).square().sum())
    return max(error, 0.0) / max(dense, rounding)


def _second_trace(moments: Moments, matrix: Tensor) -> float:
    """`tr(D (G/N) Dᵀ)` from the lower triangle, by column blocks.

    Blocks below the diagonal count twice: half the work of the full product, and no second n × n
    float64 copy is made.
    """
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, moments.columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, moments.columns)
        panel, mine = moments.second_panel(start, stop), matrix[:, start:stop]
        total += ((mine @ panel[start:stop]) * mine).sum()
        if stop < moments.columns:
            total += 2 * ((matrix[:, stop:] @ panel[stop:]) * mine).sum()
    return float(total)

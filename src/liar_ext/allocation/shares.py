"""Shares of each Site to remove, in proportion to given weights, none above its cap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.allocation.base import Budget


def capped(weights: Tensor, sizes: Tensor, caps: Tensor, total: float) -> Tensor:
    """`min(c · w_i, cap_i)` with the c for which `Σ size_i · share_i = total`.

    What the caps cut off is spread over the rest, again in proportion.

    Args:
        weights: (sites,) float64, positive; sizes, caps: (sites,) float64.
        total: of what is to be removed; where all caps together allow less, the caps are returned.
    """
    free = torch.ones_like(weights, dtype=torch.bool)
    shares = caps
    while bool(free.any()):
        rest = total - float((sizes * caps)[~free].sum())
        wished = weights * (rest / float((sizes * weights)[free].sum()))
        shares = torch.where(free, wished, caps)
        over = free & (wished > caps)
        if not bool(over.any()):
            break
        free &= ~over
        shares = caps
    return shares


def kept(
    budgets: Sequence[Budget], sparsity: float, weights: Tensor, most: float = 1.0
) -> list[float]:
    """Kept units of each Site, real numbers, so that a share `c · w_i` of each goes.

    Args:
        most: no Site loses a larger share; where the budget cannot be met like that, all lose
            the same share as far as they have more than one unit, or may lose that, too.
    """
    units = torch.tensor([float(b.units) for b in budgets], dtype=torch.float64)
    sizes = units * torch.tensor([float(b.cost) for b in budgets], dtype=torch.float64)
    total = sparsity * float(sizes.sum())
    own = 1 - torch.tensor([float(b.least) for b in budgets], dtype=torch.float64) / units
    caps = own.clamp(max=most)
    if float((sizes * caps).sum()) < total:
        weights, caps = torch.ones_like(weights), own
    return (units * (1 - capped(weights, sizes, caps, total))).tolist()

"""alpha: layers whose spectra have heavier tails lose less (AlphaPruning, arXiv 2410.10912).

With a_l the mean Hill exponent of the layer's linears, the share that is removed is

    φ_l = c · r_l        r_l = 1 − τ + 2 τ (a_l − min a) / (max a − min a)

and c such that the budget is met. A heavy tail, a small a, is taken for a well trained layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.shares import kept

# τ of the paper: the most pruned layer loses (1 + τ) / (1 − τ) times what the least pruned does
SPREAD = 0.3


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    exponents = torch.stack([budget.known.nanmean() for budget in budgets])
    # a layer of zeros, as in an expanded model, has no spectrum
    exponents = exponents.nan_to_num(nan=float(exponents.nanmean().nan_to_num()))
    low, high = exponents.min(), exponents.max()
    place = (exponents - low) / (high - low) if high > low else torch.full_like(exponents, 0.5)
    return kept(budgets, sparsity, 1 - SPREAD + 2 * SPREAD * place)


ALPHA = Allocation("alpha", wanted, survey="spectra", equal=False)

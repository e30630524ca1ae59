"""global: one ranking of all units by standardised score and cost (FLAP's AL-AM, 2312.11983).

Scores are standardised per Site, `z = (score − mean)/std`, over the columns where the criterion
scores columns, and a unit gets the mean of its columns' z. All units are sorted, the best are kept
until the parameters kept reach the budget. Unlike the published code, every Site keeps at least
one unit (unless it may lose all), and the cost of a unit is counted from its weights, which covers
grouped-query attention.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.ranking import nearest

# a spread of scores below so much of the largest is their rounding
_ROUNDING = 1e-12


def standardised(budget: Budget) -> Tensor:
    """z-scores of a Site's units, (units,) float64; zeros where all scores are equal, up to
    rounding."""
    scores = budget.known.double()
    spread = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    differ = float(spread) > _ROUNDING * float(scores.abs().max())
    z = (scores - scores.mean()) / spread if differ else torch.zeros_like(scores)
    return z.reshape(budget.units, -1).mean(1)


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    # a unit costs the same wherever its Site stands on a table of prices
    alike = [replace(budget, prices=None) for budget in budgets]
    return nearest(alike, sparsity, standardised)


GLOBAL = Allocation("global", wanted, survey="scores", equal=False)

"""influence: layers that turn the hidden states less lose more (MoDeGPT, arXiv 2408.09632).

    φ_l = L · φ · softmax_l(−BI_l / ε)        BI_l = 1 − E cos(x_in, x_out)

No layer loses more than `MOST`; what that leaves is spread over the others in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.shares import kept

# ε: the larger, the more even
TEMPERATURE = 0.1
MOST = 0.8


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    influence = torch.cat([budget.known for budget in budgets])
    # proportions alone matter: the sum over Sites instead of layers cancels
    return kept(budgets, sparsity, torch.softmax(-influence / TEMPERATURE, 0), MOST)


INFLUENCE = Allocation("influence", wanted, survey="influence", equal=False)

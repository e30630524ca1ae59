"""One ranking of the units of several Sites by their raw scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.allocation.base import Budget


def ranked(budgets: Sequence[Budget]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, costs and Sites of all units of some Sites, each (units of all,), best first.

    The best unit of each Site comes before all others: no Site is emptied.
    """
    scores = [b.known.double().reshape(b.units, -1).sum(1) for b in budgets]
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    cost = torch.tensor([b.cost for b in budgets], dtype=torch.float64)[owner]
    first = torch.cat([torch.arange(len(s)) == s.argmax() for s in scores])
    flat = torch.cat(scores)
    order = torch.where(first, torch.inf, flat).argsort(descending=True, stable=True)
    return flat[order], cost[order], owner[order]

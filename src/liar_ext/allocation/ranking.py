"""One ranking of the units of several Sites by their raw scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.allocation.base import Budget


def ranked(budgets: Sequence[Budget]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, costs and Sites of all units of some Sites, each (units of all,), best first.

    Those that come at the fixed price of their Site, at least its best one, are before all others:
    no Site is emptied. Together they cost that price.
    """
    scores = [b.known.double().reshape(b.units, -1).sum(1) for b in budgets]
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    cost, first = map(
        torch.cat, zip(*(_priced(*both) for both in zip(budgets, scores, strict=True)), strict=True)
    )
    flat = torch.cat(scores)
    order = torch.where(first, torch.inf, flat).argsort(descending=True, stable=True)
    return flat[order], cost[order], owner[order]


def _priced(budget: Budget, scores: Tensor) -> tuple[Tensor, Tensor]:
    """What each unit costs, float64, and whether it comes at the fixed price, the best one's."""
    free, fixed, slope = budget.hinge
    best = scores.argsort(descending=True, stable=True)[:free]
    costs, first = torch.full_like(scores, slope), torch.zeros(len(scores), dtype=torch.bool)
    costs[best], first[best] = 0.0, True
    costs[best[0]] = fixed
    return costs, first

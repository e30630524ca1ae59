"""One ranking of the units of several Sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from liar_ext.allocation.base import Budget


def raw(budget: Budget) -> Tensor:
    """The criterion's scores as they are, summed over each unit, (units,) float64."""
    return budget.known.double().reshape(budget.units, -1).sum(1)


def ranked(
    budgets: Sequence[Budget], score: Callable[[Budget], Tensor] = raw
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, costs and Sites of all units of some Sites, each (units of all,), best first.

    Those that come at the fixed price of their Site, at least its best one, are before all others:
    no Site is emptied, but where all of it may go. Together they cost that price.

    Args:
        score: (units,) float64 of a Site.
    """
    scores = [score(budget) for budget in budgets]
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    cost, first = map(
        torch.cat, zip(*(_priced(*both) for both in zip(budgets, scores, strict=True)), strict=True)
    )
    flat = torch.cat(scores)
    order = torch.where(first, torch.inf, flat).argsort(descending=True, stable=True)
    return flat[order], cost[order], owner[order]


def nearest(
    budgets: Sequence[Budget], sparsity: float, score: Callable[[Budget], Tensor] = raw
) -> list[float]:
    """Units of each Site in the first part of the ranking that is nearest to the budget, and at
    least in that of the fixed prices."""
    _, cost, owner = ranked(budgets, score)
    spent = cost.cumsum(0)
    count = int((spent - (1 - sparsity) * float(spent[-1])).abs().argmin()) + 1
    least = sum(map(stays, budgets))
    units = torch.bincount(owner[: max(count, least)], minlength=len(budgets))
    return units.double().tolist()


def stays(budget: Budget) -> int:
    """Units of a Site that are kept whatever else is."""
    return budget.hinge.free if budget.least else 0


def _priced(budget: Budget, scores: Tensor) -> tuple[Tensor, Tensor]:
    """What each unit costs, float64, and whether it comes at the fixed price, the best one's."""
    free, fixed, slope = budget.hinge
    best = scores.argsort(descending=True, stable=True)[:free]
    costs, first = torch.full_like(scores, slope), torch.zeros(len(scores), dtype=torch.bool)
    costs[best], first[best] = 0.0, bool(budget.least)
    costs[best[0]] = fixed
    return costs, first

"""levels: the widths with the least sum of relative errors that the budget allows.

ZipLM (arXiv 2302.04089, section 3.2) with the dynamic programme of SPDY (2201.13096): each Site has
a few levels with a cost and an error, and of all combinations the best one is found exactly, on a
budget that is cut into slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, gcd, isnan

import numpy as np

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.errors import InputError

# widths that are tried, of a Site that has more
LEVELS = 40
# costs are rounded up to a slot, so that each Site wastes half of one on average
SLOTS = 20_000


def levels(units: int, most: int = LEVELS) -> list[int]:
    """Widths at which a Site is tried: 1, and up to `most` even steps to all units."""
    steps = min(units, most)
    return sorted({1, *(round(units * step / steps) for step in range(1, steps + 1))})


def choose(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], most: float
) -> list[int]:
    """The level of each Site with the least sum of losses at a sum of costs of `most` or less.

    Exact where all costs are multiples of a slot; otherwise for costs rounded up to one. Where
    even the cheapest levels do not fit, these.

    Raises:
        InputError: a loss is NaN, which no order has a place for.
    """
    for site, errors in enumerate(losses):
        for level, error in enumerate(errors):
            if isnan(error):
                raise InputError(
                    f"allocation: the error of level {level} of choice {site} is NaN; check the "
                    "checkpoint, or compute in a wider type with --dtype"
                )
    slot = _slot(costs)
    slots = int(most / slot + 1e-9)
    weights = [[ceil(cost / slot - 1e-9) for cost in own] for own in costs]
    if sum(map(min, weights)) > slots:
        return [min(range(len(own)), key=own.__getitem__) for own in weights]
    # the least sum of the Sites so far, by slots that they may take
    best = np.zeros(slots + 1)
    picks = []
    for own, loss in zip(weights, losses, strict=True):
        tried = np.full((len(own), slots + 1), np.inf)
        for level, weight in enumerate(own):
            if weight <= slots:
                tried[level, weight:] = best[: slots + 1 - weight] + loss[level]
        pick = tried.argmin(0)
        best = np.take_along_axis(tried, pick[None], 0)[0]
        picks.append(pick)
    found = []
    left = slots
    for own, pick in zip(reversed(weights), reversed(picks), strict=True):
        found.append(int(pick[left]))
        left -= own[found[-1]]
    return found[::-1]


def errors_at(budget: Budget, widths: Sequence[int]) -> list[float]:
    """Error of a Site at these widths, from the survey of levels; linear between those.

    Without any units all of its output is lost: 1.
    """
    known = [0, *levels(budget.units)], [1.0, *budget.known.tolist()]
    return [float(error) for error in np.interp(widths, *known)]


def _slot(costs: Sequence[Sequence[float]]) -> float:
    """A part of the budget: what divides all costs, if that is not too little."""
    total = sum(max(own) for own in costs)
    if all(float(cost).is_integer() for own in costs for cost in own):
        common = gcd(*(int(cost) for own in costs for cost in own))
        return max(common, -(-int(total) // SLOTS))
    # seconds
    return total / SLOTS


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    widths = [own if b.least else [0, *own] for b in budgets for own in (levels(b.units),)]
    costs = [[b.price(w) for w in own] for own, b in zip(widths, budgets, strict=True)]
    most = sum(b.price(b.units) for b in budgets) * (1 - sparsity)
    errors = [errors_at(budget, own) for budget, own in zip(budgets, widths, strict=True)]
    chosen = choose(costs, errors, most)
    return [float(own[level]) for own, level in zip(widths, chosen, strict=True)]


BY_LEVELS = Allocation("levels", wanted, survey="levels", equal=False, prices=True)

"""Where a search looks: the levels of every Site, their prices, and how a budget is kept to.

A search goes over *full* candidates: within the budget, and with no Site whose next level would
still fit. Where more units never make a model worse, one of them is as good as any candidate.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise

from liar_ext.allocation.levels import choose, errors_at
from liar_ext.allocation.search import Candidate, Problem
from liar_ext.errors import InputError

# of every Site, the place of its level, 0 for the fewest units
Positions = tuple[int, ...]
# how much is lost when a Site goes to a place, to be compared with other Sites
Key = Callable[[int, int], float]

# what rounding may add to a sum of prices, relative to the budget
ROUNDING = 1e-9


class Space:
    """Attributes:
    levels: (levels,) kept units of each Site, ascending.
    prices: (levels,) of each Site; never falls.
    units: dense units of each Site.
    """

    def __init__(self, problem: Problem) -> None:
        """Raises:
        InputError: the lowest levels of all Sites cost more than the budget.
        ValueError: a price falls with more units.
        """
        self.problem = problem
        self.levels = [tuple(own) for own in problem.levels]
        self.prices: list[list[float]] = []
        for site, (budget, own) in enumerate(zip(problem.budgets, self.levels, strict=True)):
            prices = [budget.price(units) for units in own]
            if any(after < before for before, after in pairwise(prices)):
                raise ValueError(f"Site {site}: a price falls with more units: {prices}")
            self.prices.append(prices)
        self.units = [own[-1] for own in self.levels]
        self._check_reachable()

    def _check_reachable(self) -> None:
        least, dense = (sum(own[place] for own in self.prices) for place in (0, -1))
        if least > self.problem.most * (1 + ROUNDING):
            # rounded down: it has to be one that is accepted
            most = math.floor(1e4 * (1 - least / dense)) / 1e4
            raise InputError(
                f"--sparsity {self.problem.sparsity}: every layer keeps at least the lowest of "
                f"its levels, so that at most {most:.4g} can be removed; lower --sparsity"
            )

    def price(self, positions: Sequence[int]) -> float:
        return sum(own[place] for own, place in zip(self.prices, positions, strict=True))

    def fits(self, positions: Sequence[int]) -> bool:
        return self.price(positions) <= self.problem.most * (1 + ROUNDING)

    def candidate(self, positions: Sequence[int]) -> Candidate:
        """Kept units of every Site."""
        return tuple(own[place] for own, place in zip(self.levels, positions, strict=True))

    def widths(self, positions: Sequence[int]) -> list[float]:
        """The same as real numbers, for a wish."""
        return list(map(float, self.candidate(positions)))

    def filled(self, positions: Sequence[int], key: Key, stays: Collection[int] = ()) -> Positions:
        """Sites raised level by level, the least `key` first, until none fits any more; but for
        those that are to stay as they are."""
        now = list(positions)
        queue = [
            (key(g, p + 1), g)
            for g, p in enumerate(now)
            if p + 1 < len(self.levels[g]) and g not in stays
        ]
        heapq.heapify(queue)
        while queue:
            _, site = heapq.heappop(queue)
            now[site] += 1
            if not self.fits(now):
                # nor will it later: prices only rise
                now[site] -= 1
            elif now[site] + 1 < len(self.levels[site]):
                heapq.heappush(queue, (key(site, now[site] + 1), site))
        return tuple(now)

    def _lowered(self, positions: Sequence[int], key: Key) -> list[int]:
        """Sites lowered to their next cheaper level, the least `key` first, until all fits."""
        now = list(positions)
        queue: list[tuple[float, int, int]] = []

        def offer(site: int) -> None:
            below = self._cheaper(site, now[site])
            if below is not None:
                heapq.heappush(queue, (key(site, below), site, below))

        for site in range(len(now)):
            offer(site)
        while not self.fits(now):
            _, site, now[site] = heapq.heappop(queue)
            offer(site)
        return now

    def _cheaper(self, site: int, position: int) -> int | None:
        """The highest level that costs less; None where there is none."""
        prices = self.prices[site]
        return next((p for p in range(position - 1, -1, -1) if prices[p] < prices[position]), None)

    def place(self, wishes: Sequence[float]) -> Positions:
        """A full candidate near a wish: the nearest levels, then the least distortion first.

        Args:
            wishes: (Sites,) units, real numbers.
        """

        def distortion(site: int, position: int) -> float:
            return abs(self.levels[site][position] - wishes[site]) / self.units[site]

        nearest = [
            min(range(len(own)), key=lambda p, s=site: distortion(s, p))  # type: ignore[misc]
            for site, own in enumerate(self.levels)
        ]
        return self.filled(self._lowered(nearest, distortion), distortion)

    def uniform(self) -> Positions:
        """The same share of each Site, the largest one that fits; the rest is spread evenly."""

        def at(share: float) -> Positions:
            limits = [share * units * (1 + ROUNDING) for units in self.units]
            return tuple(
                max((p for p, kept in enumerate(own) if kept <= limit), default=0)
                for own, limit in zip(self.levels, limits, strict=True)
            )

        shares = sorted(
            {
                kept / units
                for own, units in zip(self.levels, self.units, strict=True)
                for kept in own
            }
        )
        # below the least share all are at their lowest levels, which fit
        low, high = 0, len(shares)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.fits(at(shares[middle])) else (low, middle)
        start = at(shares[low - 1]) if low else at(0.0)
        return self.filled(start, lambda g, p: self.levels[g][p] / self.units[g])

    def errors(self) -> list[list[float]]:
        """Error of each Site at its levels, from the survey of levels; linear between those."""
        return [
            errors_at(budget, own)
            for own, budget in zip(self.levels, self.problem.budgets, strict=True)
        ]

    def solved(self, errors: Sequence[Sequence[float]], weights: Iterable[float]) -> Positions:
        """The least sum of weighted errors that the budget allows (`levels.choose`), made full."""
        weighted = [[w * e for e in own] for w, own in zip(weights, errors, strict=True)]
        chosen = choose(self.prices, weighted, self.problem.most)
        return self.filled(chosen, lambda g, p: weighted[g][p] - weighted[g][p - 1])

"""Allocation: a budget into a number of kept units for each Site, on each Site's grid."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from liar_ext.allocation.priced import asked
from liar_ext.allocation.prices import Hinge, Prices
from liar_ext.errors import InputError

if TYPE_CHECKING:
    from liar_ext.allocation.search import Calls, Problem, Search


@dataclass(frozen=True)
class Budget:
    """What an allocation knows of one Site.

    Attributes:
        kind: `ffn` or `heads`; units: how many there are.
        cost: of one unit, in what the budget counts: parameters, FLOPs of a token, or the mean
            of what `prices` says.
        finding: of the allocation's survey, float64 on the CPU; None when it asks for none.
        prices: where units do not all cost the same, of any number of them: seconds.
        least: units that it keeps; 0 where all of it may go.
    """

    kind: str
    units: int
    cost: float
    finding: Tensor | None = None
    prices: Prices | None = None
    least: int = 1

    def price(self, units: float) -> float:
        """What this many kept units cost; without any there is nothing that takes time."""
        if self.prices is None:
            return float(self.cost * units)
        return self.prices.at(units) if units >= 1 else self.prices.at(1) * units

    @property
    def like(self) -> tuple[object, ...]:
        """The same for Sites of one kind, size and price."""
        return self.kind, self.units, self.cost, self.prices, self.least

    @property
    def hinge(self) -> Hinge:
        """The price as a constant and a line."""
        if self.prices is None:
            return Hinge(1, float(self.cost), float(self.cost))
        return self.prices.hinge

    @property
    def known(self) -> Tensor:
        """The finding, for an allocation with a survey."""
        assert self.finding is not None, "the driver supplies what the survey finds"
        return self.finding


@dataclass(frozen=True)
class Allocation:
    """Attributes:
    name: as users write it.
    wanted: (budgets, sparsity) -> kept units of each Site, real numbers.
    survey: name of what must be known of all Sites first (`survey`), None for nothing.
    equal: Sites of one kind and size must get the same width.
    search: tries whole models; what it finds takes the place of `wanted`. calls: what it asks;
        check: raises InputError for a problem that it cannot solve, whatever the answers; what
            there is to say of how it goes about it, if anything.
    prices: `wanted` meets the budget in prices, whatever they are. The others count units, and are
        asked for the sparsity of theirs that meets it (`priced`).
    """

    name: str
    wanted: Callable[[Sequence[Budget], float], list[float]]
    survey: str | None
    equal: bool
    search: Search | None = None
    calls: Calls | None = None
    check: Callable[[Problem], str | None] | None = None
    prices: bool = False

    def widths(
        self,
        budgets: Sequence[Budget],
        sparsity: float,
        round_to: int = 1,
        wanted: Sequence[float] | None = None,
    ) -> list[int]:
        """Kept units of each Site: its least or more, FFN widths multiples of `round_to`, and the
        price removed as close to the budget as the grid allows.

        Rounding each Site alone drifts from the budget (4 KV groups cannot lose 30 %), so after
        rounding one step after another is taken while they bring the total closer: the one that
        comes closest, or of widths that a search has tried the one that changes them least. A step
        goes to the next width on the grid that has another price, and in the end every Site has the
        most units that it can have at its price.

        Args:
            wanted: what a search has found in the place of `self.wanted`.
        Raises:
            InputError: the least widths of all Sites are more than the budget.
        """
        check_reachable(budgets, sparsity, round_to)
        searched = wanted is not None
        if wanted is None:
            linear = all(budget.prices is None for budget in budgets)
            wanted = (
                self.wanted(budgets, sparsity)
                if self.prices or linear
                else asked(self.wanted, budgets, sparsity)
            )
        groups: dict[object, list[int]] = {}
        for index, budget in enumerate(budgets):
            groups.setdefault(budget.like if self.equal else index, []).append(index)
        members = list(groups.values())
        grids = [width_grid(budgets[m[0]], round_to) for m in members]
        aims = [sum(wanted[i] for i in m) / len(m) for m in members]
        target = sum(b.price(b.units) for b in budgets) * (1 - sparsity)
        chosen = [_nearest(grid, aim) for grid, aim in zip(grids, aims, strict=True)]
        prices = _prices([budgets[m[0]] for m in members], grids)

        def price(group: int, position: int) -> float:
            return len(members[group]) * prices[group][position]

        def after(group: int, step: int) -> int:
            own, now = prices[group], prices[group][chosen[group]]
            return bisect_left(own, now) - 1 if step < 0 else bisect_right(own, now)

        kept = sum(price(group, position) for group, position in enumerate(chosen))
        while True:
            best: tuple[float, float, int, int] | None = None
            for group, grid in enumerate(grids):
                for step in (-1, 1):
                    position = after(group, step)
                    if not 0 <= position < len(grid):
                        continue
                    if searched and not (grid[position] and grid[chosen[group]]):
                        # a search that has left a part out, or kept it, has judged just that
                        continue
                    change = price(group, position) - price(group, chosen[group])
                    error = abs(kept + change - target)
                    distortion = abs(grid[position] - aims[group]) / grid[-1]
                    if error < abs(kept - target):
                        # what was tried stays: rather a few neurons than a head that overshoots
                        order = (distortion, error) if searched else (error, distortion)
                        best = min(best or (*order, group, position), (*order, group, position))
            if best is None:
                break
            _, _, group, position = best
            kept += price(group, position) - price(group, chosen[group])
            chosen[group] = position
        # what saves nothing stays: up to the last width of that price
        chosen = [bisect_right(own, own[at]) - 1 for own, at in zip(prices, chosen, strict=True)]
        widths = [0] * len(budgets)
        for group, indices in enumerate(members):
            for index in indices:
                widths[index] = grids[group][chosen[group]]
        return widths


def check_reachable(budgets: Sequence[Budget], sparsity: float, round_to: int = 1) -> None:
    """Refuse a budget that no allocation can meet.

    Raises:
        InputError: with the largest sparsity that there is, or why there is none.
    """
    if all(width_grid(budget, round_to) == [budget.units] for budget in budgets):
        why = (
            "every targeted Site has a single unit (layers with one KV group); add ffn to --target"
        )
        if any(budget.units > 1 for budget in budgets):
            why = "no targeted Site has a smaller width on its grid; lower --round-to"
        raise InputError(f"--sparsity {sparsity} with --round-to {round_to} removes nothing: {why}")
    total = sum(b.price(b.units) for b in budgets)
    least = sum(b.price(width_grid(b, round_to)[0]) for b in budgets)
    measured = any(b.prices is not None for b in budgets)
    if measured and least >= total * (1 - 1e-4):
        raise InputError(
            f"--sparsity {sparsity}: in the --latency table no time goes with any unit; measure a "
            "larger --batch or --seq-len, or give another --budget"
        )
    if total > least > total * (1 - sparsity) * (1 + 1e-9):
        # rounded down: it has to be one that is accepted
        most = math.floor(1e4 * (1 - least / total)) / 1e4
        grid = f" and FFN widths are multiples of {round_to}" if round_to > 1 else ""
        what = " of the measured time" if measured else ""
        who = "every layer" if all(b.least for b in budgets) else "the first layer"
        raise InputError(
            f"--sparsity {sparsity}: {who} keeps at least one targeted unit{grid}, so "
            f"that at most {most:.4g}{what} can be removed; lower --sparsity"
        )


def width_grid(budget: Budget, round_to: int) -> list[int]:
    """Widths that a Site may have, ascending."""
    step = round_to if budget.kind == "ffn" else 1
    grid = list(range(step if budget.least else 0, budget.units + 1, step))
    if not grid or grid[-1] != budget.units:
        grid.append(budget.units)  # the dense width is always allowed
    return grid


def _prices(budgets: Sequence[Budget], grids: Sequence[list[int]]) -> list[list[float]]:
    """Of every width of each grid; Sites that are alike share theirs."""
    known: dict[object, list[float]] = {}
    found = []
    for budget, grid in zip(budgets, grids, strict=True):
        if budget.like not in known:
            known[budget.like] = [budget.price(width) for width in grid]
        found.append(known[budget.like])
    return found


def _nearest(grid: list[int], aim: float) -> int:
    return min(range(len(grid)), key=lambda i: (abs(grid[i] - aim), i))

"""Allocation: a budget into a number of kept units for each Site, on each Site's grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from liar_ext.errors import InputError

if TYPE_CHECKING:
    from liar_ext.allocation.search import Search


@dataclass(frozen=True)
class Budget:
    """What an allocation knows of one Site.

    Attributes:
        kind: `ffn` or `heads`; units: how many there are.
        cost: of one unit, in what the budget counts: parameters, or FLOPs of a token.
        finding: of the allocation's survey, float64 on the CPU; None when it asks for none.
    """

    kind: str
    units: int
    cost: int
    finding: Tensor | None = None

    def price(self, units: int) -> float:
        """What this many kept units cost."""
        return float(self.cost * units)

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
    search: tries whole models; what it finds takes the place of `wanted`.
    """

    name: str
    wanted: Callable[[Sequence[Budget], float], list[float]]
    survey: str | None
    equal: bool
    search: Search | None = None

    def widths(
        self,
        budgets: Sequence[Budget],
        sparsity: float,
        round_to: int = 1,
        wanted: Sequence[float] | None = None,
    ) -> list[int]:
        """Kept units of each Site: at least one, FFN widths multiples of `round_to`, and the
        cost removed as close to the budget as the grid allows.

        Rounding each Site alone drifts from the budget (4 KV groups cannot lose 30 %), so after
        rounding the cheapest distortions are taken, one grid step at a time, while they bring the
        total closer.

        Args:
            wanted: what a search has found in the place of `self.wanted`.
        Raises:
            InputError: the least widths of all Sites are more than the budget.
        """
        check_reachable(budgets, sparsity, round_to)
        if wanted is None:
            wanted = self.wanted(budgets, sparsity)
        groups: dict[object, list[int]] = {}
        for index, budget in enumerate(budgets):
            key = (budget.kind, budget.units, budget.cost) if self.equal else index
            groups.setdefault(key, []).append(index)
        members = list(groups.values())
        grids = [width_grid(budgets[m[0]], round_to) for m in members]
        aims = [sum(wanted[i] for i in m) / len(m) for m in members]
        costs = [sum(budgets[i].cost for i in m) for m in members]
        target = sum(b.units * b.cost for b in budgets) * (1 - sparsity)
        chosen = [_nearest(grid, aim) for grid, aim in zip(grids, aims, strict=True)]
        kept = sum(grid[c] * cost for grid, c, cost in zip(grids, chosen, costs, strict=True))
        while True:
            best: tuple[float, float, int, int] | None = None
            for group, grid in enumerate(grids):
                for step in (-1, 1):
                    position = chosen[group] + step
                    if not 0 <= position < len(grid):
                        continue
                    change = (grid[position] - grid[chosen[group]]) * costs[group]
                    error = abs(kept + change - target)
                    distortion = abs(grid[position] - aims[group]) / grid[-1]
                    if error < abs(kept - target):
                        best = min(
                            best or (error, distortion, group, step),
                            (error, distortion, group, step),
                        )
            if best is None:
                break
            _, _, group, step = best
            kept += (grids[group][chosen[group] + step] - grids[group][chosen[group]]) * costs[
                group
            ]
            chosen[group] += step
        widths = [0] * len(budgets)
        for group, indices in enumerate(members):
            for index in indices:
                widths[index] = grids[group][chosen[group]]
        return widths


def check_reachable(budgets: Sequence[Budget], sparsity: float, round_to: int = 1) -> None:
    """Refuse a budget that no allocation can meet.

    Raises:
        InputError: with the largest sparsity that there is.
    """
    total = sum(b.units * b.cost for b in budgets)
    least = sum(width_grid(b, round_to)[0] * b.cost for b in budgets)
    # where nothing at all can go, that is said after the widths
    if total > least > total * (1 - sparsity) * (1 + 1e-9):
        # rounded down: it has to be one that is accepted
        most = math.floor(1e4 * (1 - least / total)) / 1e4
        grid = f" and FFN widths are multiples of {round_to}" if round_to > 1 else ""
        raise InputError(
            f"--sparsity {sparsity}: every layer keeps at least one targeted unit{grid}, so "
            f"that at most {most:.4g} can be removed; lower --sparsity"
        )


def width_grid(budget: Budget, round_to: int) -> list[int]:
    """Widths that a Site may have, ascending."""
    step = round_to if budget.kind == "ffn" else 1
    grid = list(range(step, budget.units + 1, step))
    if not grid or grid[-1] != budget.units:
        grid.append(budget.units)  # the dense width is always allowed
    return grid


def _nearest(grid: list[int], aim: float) -> int:
    return min(range(len(grid)), key=lambda i: (abs(grid[i] - aim), i))

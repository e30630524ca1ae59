"""Which segments: a dynamic programme over boundaries and time (LayerMerge, 2406.12837, section 4).

    V[0, 0] = 0,   V[j, t] = max over segments (i, j, k) of V[i, t − c(i, j, k)] + I[i, j, k]

with `c = ⌈T / unit⌉`: a plan that fits the budget in units fits it in seconds. (Rounded down, as in
LayerMerge's repository, a plan may take up to one unit more for each of its segments.) Each cell
has the K best ways to it, so that the K best plans come out, and can be compared as whole models:
the sum over segments is a surrogate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liar_ext.errors import InputError

# importances that differ by less are equal, and the faster plan is the better one
TIE = 7


@dataclass(frozen=True)
class Option:
    """One segment as the programme sees it: what it is worth, and seconds it takes."""

    start: int
    end: int
    kernel: int
    importance: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Options from the first boundary to the last, and their sums."""

    options: tuple[Option, ...]

    @property
    def importance(self) -> float:
        return math.fsum(option.importance for option in self.options)

    @property
    def seconds(self) -> float:
        return math.fsum(option.seconds for option in self.options)

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts the best first."""
        return -round(self.importance, TIE), self.seconds


def fastest(options: Sequence[Option], length: int) -> Plan | None:
    """The fastest plan; None where no options lead from the first boundary to the last."""
    best: dict[int, tuple[float, tuple[Option, ...]]] = {0: (0.0, ())}
    for option in sorted(options, key=lambda o: o.end):
        if option.start in best:
            seconds, before = best[option.start]
            found = (seconds + option.seconds, (*before, option))
            if option.end not in best or found[0] < best[option.end][0]:
                best[option.end] = found
    return Plan(best[length][1]) if length in best else None


def best_plans(
    options: Sequence[Option], length: int, budget: float, *, top: int = 1, steps: int = 2000
) -> list[Plan]:
    """The `top` best plans within a budget, best first; equal ones by their time.

    Exact over the rounded times: what it may miss are plans that need the last
    `segments / steps` of the budget. Time and memory are O(options · steps · top).

    Args:
        options: any segments of a chain; at most one for each (start, end, kernel).
        length: boundaries are 0 to `length`; budget: seconds.
        top: plans to return; there may be fewer.
        steps: units in the budget.
    Raises:
        InputError: a number that is none, or no plan is within the budget.
    """
    for option in options:
        if not (math.isfinite(option.importance) and 0 <= option.seconds < math.inf):
            raise InputError(f"the table has {option}, which is no importance or no time")
    least = fastest(options, length)
    if least is None or least.seconds > budget:
        takes = (
            "no segments" if least is None else f"the fastest takes {least.seconds * 1e3:.4g} ms"
        )
        raise InputError(f"no plan is within {budget * 1e3:.4g} ms: {takes}")
    unit = budget / steps if budget else 1.0
    cells = steps + 1
    empty = np.full((length + 1, cells, top), -np.inf)
    value, seconds = empty, np.full_like(empty, np.inf)
    source = np.full((length + 1, cells, top), -1, dtype=np.int64)
    value[0, 0, 0], seconds[0, 0, 0] = 0.0, 0.0
    order = sorted(range(len(options)), key=lambda n: options[n].end)
    for end in range(1, length + 1):
        here = [n for n in order if options[n].end == end]
        costs = [_units(options[n].seconds, unit) for n in here]
        ways = [(n, c) for n, c in zip(here, costs, strict=True) if c <= steps]
        if not ways:
            continue
        # candidates of each cell: every way there, from each of the best ways to its start
        shape = (cells, len(ways) * top)
        values, times = np.full(shape, -np.inf), np.full(shape, np.inf)
        origins = np.full(shape, -1, dtype=np.int64)
        for place, (n, cost) in enumerate(ways):
            option, columns = options[n], slice(place * top, (place + 1) * top)
            before = value[option.start, : cells - cost]
            values[cost:, columns] = before + option.importance
            times[cost:, columns] = seconds[option.start, : cells - cost] + option.seconds
            origins[cost:, columns] = n * top + np.arange(top)
        best = np.lexsort((times, -np.round(values, TIE)), axis=1)[:, :top]
        value[end] = np.take_along_axis(values, best, 1)
        seconds[end] = np.take_along_axis(times, best, 1)
        source[end] = np.where(np.isfinite(value[end]), np.take_along_axis(origins, best, 1), -1)
    if not np.isfinite(value[length]).any():
        # it is within the budget in seconds, and not in units
        return [least]
    costs_of = [_units(option.seconds, unit) for option in options]
    found = [
        _walk(options, costs_of, source, length, int(t), int(k), top)
        for t, k in zip(*np.nonzero(np.isfinite(value[length])), strict=True)
    ]
    return sorted(found, key=lambda plan: plan.rank)[:top]


def _units(seconds: float, unit: float) -> int:
    """Rounded up; a hair above a whole number is the rounding of the division."""
    units = seconds / unit
    return round(units) if abs(units - round(units)) < 1e-9 * max(units, 1.0) else math.ceil(units)


def _walk(
    options: Sequence[Option],
    costs: Sequence[int],
    source: Any,
    at: int,
    cell: int,
    which: int,
    top: int,
) -> Plan:
    """Back from one way to a cell."""
    path: list[Option] = []
    while at > 0:
        n, which = divmod(int(source[at, cell, which]), top)
        path.append(options[n])
        at, cell = options[n].start, cell - costs[n]
    return Plan(tuple(reversed(path)))


def best_plans_reference(
    options: Sequence[Option], length: int, budget: float, *, top: int = 1
) -> list[Plan]:
    """The definition: every plan there is. Exponential; of short chains."""

    def ways(at: int) -> list[tuple[Option, ...]]:
        if at == length:
            return [()]
        here = [option for option in options if option.start == at]
        return [(option, *rest) for option in here for rest in ways(option.end)]

    plans = [Plan(way) for way in ways(0)]
    return sorted((p for p in plans if p.seconds <= budget), key=lambda plan: plan.rank)[:top]

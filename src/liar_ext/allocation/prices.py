"""Prices: what any number of kept units costs, from a few that were measured."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class Hinge(NamedTuple):
    """`fixed` for up to `free` units, at least one, and `slope` for each unit beyond them."""

    free: int
    fixed: float
    slope: float

    def price(self, units: float) -> float:
        return self.fixed + self.slope * max(units - self.free, 0.0)


@dataclass(frozen=True)
class Prices:
    """A non-decreasing, piecewise linear price.

    Attributes:
        units: ascending, from 1; values: of each of them, non-decreasing.
    """

    units: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def smoothed(cls, units: Sequence[int], measured: Sequence[float]) -> Prices:
        """The non-decreasing values that are nearest to those measured, by least squares.

        Noise makes a measurement of more units faster than one of fewer, now and then; their mean
        stands for both (isotonic regression; pool adjacent violators).
        """
        pools: list[tuple[float, int]] = []
        for value in measured:
            pools.append((value, 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (one, few), (other, more) = pools[-2:]
                pools[-2:] = [((one * few + other * more) / (few + more), few + more)]
        return cls(tuple(units), tuple(value for value, count in pools for _ in range(count)))

    def at(self, units: float) -> float:
        """The price between two measured widths is on the line between theirs."""
        if units <= self.units[0]:
            return self.values[0]
        if units >= self.units[-1]:
            return self.values[-1]
        right = bisect_right(self.units, units)
        low, high = self.units[right - 1], self.units[right]
        before, after = self.values[right - 1], self.values[right]
        # not before + share · difference: this stays between the two, whatever is rounded
        share = (units - low) / (high - low)
        return before * (1 - share) + after * share if before < after else before

    @cached_property
    def secant(self) -> float:
        """What a unit costs on average, without what the first one costs."""
        steps = self.units[-1] - self.units[0]
        return (self.values[-1] - self.values[0]) / steps if steps else self.values[-1]

    @cached_property
    def hinge(self) -> Hinge:
        """The best fit by a constant and, from some number of units on, a line.

        Least squares over `fixed`, `slope` ≥ 0 and the number of units that are free.
        """
        units, values = np.asarray(self.units, float), np.asarray(self.values)
        if len(units) == 1:
            return Hinge(1, self.values[0], self.values[0])
        starts = np.arange(1, self.units[-1])
        beyond = np.maximum(units - starts[:, None], 0.0)
        mean, level = beyond.mean(1, keepdims=True), values.mean()
        centred = beyond - mean
        # neither values nor any row of `beyond` decrease: below 0 there is only rounding
        slopes = np.maximum((centred @ (values - level)) / (centred**2).sum(1), 0.0)
        fixed = level - slopes * mean[:, 0]
        errors = ((fixed[:, None] + slopes[:, None] * beyond - values) ** 2).sum(1)
        # of fits that rounding alone tells apart, the one that gives least for free
        best = int((errors <= errors.min() + 1e-24 * float((values**2).sum())).argmax())
        return Hinge(int(starts[best]), max(float(fixed[best]), 0.0), float(slopes[best]))

"""Prices from measurements: smoothed, interpolated, and fitted, each against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from liar_ext.allocation import Budget
from liar_ext.allocation.prices import Prices


def drawn(seed: int, count: int = 9, noise: float = 1.0) -> tuple[list[int], list[float]]:
    """Rising units from 1, and times that rise but for noise."""
    generator = np.random.default_rng(seed)
    units = [1, *(1 + generator.integers(1, 30, count - 1).cumsum()).tolist()]
    times = 5 + 0.1 * np.array(units) + noise * generator.standard_normal(count)
    return units, times.tolist()


@pytest.mark.parametrize("noise", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_smoothed_values_are_the_isotonic_regression(seed, noise):
    units, times = drawn(seed, noise=noise)
    found = Prices.smoothed(units, times)
    # max-min formula of the least squares under v_1 ≤ v_2 ≤ …
    expected = [
        max(
            min(float(np.mean(times[first : last + 1])) for last in range(place, len(times)))
            for first in range(place + 1)
        )
        for place in range(len(times))
    ]
    assert found.units == tuple(units)
    assert found.values == pytest.approx(expected)
    assert all(a <= b for a, b in itertools.pairwise(found.values))
    if not noise:
        assert found.values == tuple(times)


@pytest.mark.parametrize("seed", range(3))
def test_prices_between_are_on_the_line(seed):
    prices = Prices.smoothed(*drawn(seed))
    asked = np.linspace(0, prices.units[-1] + 5, 301)
    expected = np.interp(asked, prices.units, prices.values)
    assert [prices.at(float(u)) for u in asked] == pytest.approx(expected)
    for units, value in zip(prices.units, prices.values, strict=True):
        assert prices.at(units) == value


def by_search(units: list[int], values: list[float]) -> tuple[float, int, np.ndarray]:
    """Every number of free units, each with its least squares: error, free, (fixed, slope)."""
    found = []
    for free in range(1, units[-1]):
        design = np.stack([np.ones(len(units)), np.maximum(np.array(units) - free, 0.0)], 1)
        solution = np.linalg.lstsq(design, np.array(values), rcond=None)[0]
        assert solution[1] >= -1e-9
        found.append((float(((design @ solution - values) ** 2).sum()), free, solution))
    return min(found, key=lambda one: one[0])


@pytest.mark.parametrize("seed", range(6))
def test_the_hinge_has_the_least_squares_of_all(seed):
    prices = Prices.smoothed(*drawn(seed, noise=2.0))
    error, _, _ = by_search(list(prices.units), list(prices.values))
    fitted = [prices.hinge.price(units) for units in prices.units]
    assert sum((f - v) ** 2 for f, v in zip(fitted, prices.values, strict=True)) == pytest.approx(
        error, rel=1e-9
    )


@pytest.mark.parametrize(("free", "fixed", "slope"), [(1, 2.0, 0.5), (13, 7.0, 0.25), (40, 1.0, 3)])
def test_a_table_that_is_a_hinge_is_found_again(free, fixed, slope):
    units = [1, 5, 10, 13, 20, 40, 77, 100]
    hinge = Prices(tuple(units), tuple(fixed + slope * max(u - free, 0) for u in units)).hinge
    assert hinge.free == free
    assert (hinge.fixed, hinge.slope) == pytest.approx((fixed, slope))


def test_where_nothing_rises_all_but_one_unit_more_are_as_good_as_free():
    hinge = Prices((1, 4, 9), (2.0, 2.0, 2.0)).hinge
    assert (hinge.fixed, hinge.slope) == (2.0, 0.0)


def test_a_site_of_one_unit_has_one_price():
    prices = Prices((1,), (3.0,))
    assert prices.at(1) == prices.secant == prices.hinge.price(1) == 3.0


def test_without_a_table_every_unit_costs_the_same():
    budget = Budget("ffn", 10, 7)
    assert [budget.price(u) for u in (1, 2.5, 10)] == [7.0, 17.5, 70.0]
    assert [budget.hinge.price(u) for u in (1, 2, 10)] == [7.0, 14.0, 70.0]


def test_the_secant_leaves_out_what_the_first_unit_costs():
    assert Prices((1, 3, 11), (4.0, 4.5, 9.0)).secant == pytest.approx(0.5)

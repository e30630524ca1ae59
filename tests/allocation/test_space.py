"""Keeping to a budget level by level, and the dynamic programme on any prices: by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from liar_searches import Stairs, is_full, problem, within

from liar_ext import InputError
from liar_ext.allocation import Budget
from liar_ext.allocation.levels import SLOTS, choose
from liar_ext.allocation.search import Problem
from liar_ext.allocation.space import Space

CASES = [
    pytest.param(seed, stairs, sparsity, id=f"{seed}-{'stairs' if stairs else 'linear'}-{sparsity}")
    for seed, stairs, sparsity in itertools.product(range(4), (False, True), (0.2, 0.35))
]


def plain(levels: list[tuple[int, ...]], sparsity: float, kinds: str = "ffff") -> Problem:
    named = {"f": "ffn", "h": "heads"}
    budgets = [Budget(named[kind], own[-1], 1) for own, kind in zip(levels, kinds, strict=False)]
    return Problem(budgets, sparsity, levels, 10, 0)


@pytest.mark.parametrize(("seed", "stairs", "sparsity"), CASES)
def test_a_wish_becomes_a_full_candidate_within_the_budget(seed, stairs, sparsity):
    given, _ = problem(seed, 5, stairs=stairs, sparsity=sparsity)
    space, drawn = Space(given), random.Random(seed)
    allowed = set(within(given))
    for _ in range(50):
        wishes = [drawn.uniform(-1, 1.2 * units) for units in space.units]
        candidate = space.candidate(space.place(wishes))
        assert candidate in allowed
        assert is_full(given, candidate)


@pytest.mark.parametrize(("seed", "stairs", "sparsity"), CASES)
def test_a_full_candidate_is_its_own_wish(seed, stairs, sparsity):
    given, _ = problem(seed, stairs=stairs, sparsity=sparsity)
    space = Space(given)
    found = [candidate for candidate in within(given) if is_full(given, candidate)]
    assert found
    for candidate in found:
        assert space.candidate(space.place(list(map(float, candidate)))) == candidate


def test_of_two_sites_that_are_too_much_the_one_that_stays_nearer_its_wish_goes_down():
    given = plain([(10, 20, 30), (10, 20, 30)], 20 / 60)
    space = Space(given)
    # 30 + 20 is one level too much: 10 is 6 from 16, 20 is 9 from 29
    assert space.candidate(space.place([29.0, 16.0])) == (30, 10)
    assert space.candidate(space.place([26.0, 16.0])) == (20, 20)


@pytest.mark.parametrize(("seed", "stairs", "sparsity"), CASES)
def test_uniform_is_the_largest_share_of_all_sites_that_fits(seed, stairs, sparsity):
    given, _ = problem(seed, stairs=stairs, sparsity=sparsity)
    space = Space(given)
    found = space.candidate(space.uniform())
    assert is_full(given, found)

    def at(share: float) -> tuple[int, ...]:
        return tuple(
            max((kept for kept in own if kept <= share * own[-1] + 1e-9), default=own[0])
            for own in given.levels
        )

    fitting = [at(place / 1000) for place in range(1001)]
    largest = [candidate for candidate in fitting if given.price(candidate) <= given.most][-1]
    assert all(kept >= least for kept, least in zip(found, largest, strict=True))


def test_uniform_is_exact_where_levels_allow():
    for kinds in ("ffff", "fhfh"):
        given = plain([(16, 32, 48, 64), (2, 4, 6, 8)] * 2, 0.25, kinds)
        space = Space(given)
        assert space.candidate(space.uniform()) == (48, 6, 48, 6)


@pytest.mark.parametrize(("seed", "stairs", "sparsity"), CASES)
def test_the_solution_for_any_weights_has_the_least_sum_of_errors(seed, stairs, sparsity):
    """Exactly where prices are whole; else what rounding up to slots allows, never more."""
    given, losses = problem(seed, stairs=stairs, sparsity=sparsity)
    space, drawn = Space(given), random.Random(seed)
    errors = space.errors()
    for site, own in enumerate(given.levels):
        expected = [losses.alone(site, kept) for kept in own]
        assert errors[site] == pytest.approx(expected, rel=1e-12)
    candidates = within(given)
    # each Site's price is rounded up by less than a slot
    rounded = len(space.levels) * sum(own[-1] for own in space.prices) / SLOTS if stairs else 0
    nearly = [c for c in candidates if given.price(c) <= given.most - rounded + 1e-9]
    for _ in range(5):
        weights = [drawn.random() for _ in space.levels]

        def total(candidate, weights=weights):
            return sum(w * losses.alone(s, candidate[s]) for s, w in enumerate(weights))

        found = space.candidate(space.solved(errors, weights))
        assert found in candidates
        assert total(found) <= min(map(total, nearly)) * (1 + 1e-12)
        assert total(found) >= min(map(total, candidates)) * (1 - 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 12345.678], ids=str)
def test_the_dynamic_programme_takes_prices_in_any_unit(scale):
    """Sums of seconds are bounded as sums of parameters are."""
    drawn = random.Random(3)
    costs = [sorted(drawn.uniform(0, 5) * scale for _ in range(4)) for _ in range(4)]
    losses = [sorted((drawn.random() for _ in range(4)), reverse=True) for _ in range(4)]
    most = 0.6 * sum(own[-1] for own in costs)
    slot = sum(own[-1] for own in costs) / SLOTS

    def total(table, chosen):
        return sum(own[level] for own, level in zip(table, chosen, strict=True))

    found = choose(costs, losses, most)
    every = list(itertools.product(range(4), repeat=4))
    assert total(costs, found) <= most
    tight = min(total(losses, c) for c in every if total(costs, c) <= most - 4 * slot)
    assert total(losses, found) <= tight + 1e-12


def test_errors_between_two_levels_of_the_survey_are_on_a_line():
    given, _ = problem(0, 1)
    own = given.budgets[0]
    known = own.known.tolist()
    moved = dataclasses.replace(own, units=400, finding=own.known.new_tensor([3.0, *range(40)]))
    # the survey's levels are 1, 10, 20, ..., 400 units
    space = Space(Problem([moved], 0.1, [(1, 5, 15, 400)], 1, 0))
    assert space.errors() == [pytest.approx([3.0, 3 - 3 * 4 / 9, 0.5, 39.0])]
    assert len(known) == own.units


@pytest.mark.parametrize("stairs", [False, True], ids=["linear", "stairs"])
def test_a_budget_below_the_lowest_levels_is_refused_with_the_most_that_can_go(stairs):
    given, _ = problem(1, stairs=stairs, sparsity=0.3)
    dense, least = (given.price([own[place] for own in given.levels]) for place in (-1, 0))
    with pytest.raises(InputError, match=r"--sparsity 0\.99: .* lower --sparsity") as caught:
        Space(dataclasses.replace(given, sparsity=0.99))
    assert "\n" not in str(caught.value)
    most = float(str(caught.value).partition("at most ")[2].split()[0])
    assert 0 <= 1 - least / dense - most < 1e-4
    space = Space(dataclasses.replace(given, sparsity=most))
    assert space.candidate(space.uniform())[0] == given.levels[0][0]


def test_what_no_problem_may_be_is_named():
    class Falling(Stairs):
        def price(self, units: int) -> float:
            return 10.0 - units

    with pytest.raises(ValueError, match=r"Site 0: a price falls"):
        Space(Problem([Falling("ffn", 4, 1)], 0.1, [(2, 4)], 1, 0))

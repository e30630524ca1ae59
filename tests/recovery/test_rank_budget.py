"""Ranks under a budget are the best that there are, whatever the gains and costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from liar_ext.recovery import rank_budget
from liar_ext.recovery.rank_budget import allocate


def concave(generator, most):
    steps = np.sort(generator.random(most))[::-1]
    return np.concatenate([[0.0], np.cumsum(steps)])


def best(gains, costs, budget, least):
    """By trying all."""
    found = -np.inf
    for ranks in itertools.product(*(range(least, len(own)) for own in gains)):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            found = max(found, sum(own[r] for own, r in zip(gains, ranks, strict=True)))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("costs", [(5, 5, 5, 5), (6, 9, 4, 7), (12, 30, 12, 18)])
@pytest.mark.parametrize("shape", ["concave", "any"])
def test_as_good_as_the_best_of_all(seed, costs, shape):
    generator = np.random.default_rng(seed)
    least = seed % 2
    gains = [
        concave(generator, 5) if shape == "concave" else np.cumsum(generator.random(6)) ** 2
        for _ in costs
    ]
    budget = int(sum(costs) * generator.uniform(1, 3.5))
    ranks = allocate(gains, costs, budget, least=least)
    assert min(ranks) >= least
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    value = sum(own[r] for own, r in zip(gains, ranks, strict=True))
    assert value == pytest.approx(best(gains, costs, budget, least), rel=1e-12)


def test_greedy_and_programme_agree():
    generator = np.random.default_rng(0)
    gains = [concave(generator, 32) for _ in range(32)]
    costs, budget = [77] * 32, 77 * 8 * 32
    one = allocate(gains, costs, budget)
    other = rank_budget._programme(gains, costs, budget, 1)
    assert sum(one) == sum(other) == 256
    assert one == other


def test_larger_units_keep_the_budget(monkeypatch):
    """And are as good as the best, but for what rounding costs up can take."""
    generator = np.random.default_rng(1)
    gains = [concave(generator, 6) for _ in range(4)]
    costs, budget = (101, 211, 97, 151), 1600
    exact = allocate(gains, costs, budget)
    monkeypatch.setattr(rank_budget, "STATES", 60)
    rough = allocate(gains, costs, budget)
    spent = sum(r * c for r, c in zip(rough, costs, strict=True))
    assert spent <= budget

    def value(ranks):
        return sum(own[r] for own, r in zip(gains, ranks, strict=True))

    # 24 ranks at most, each dearer by less than a unit of 32
    assert best(gains, costs, budget - 24 * 32, 1) <= value(rough) <= value(exact)


def test_ranks_that_give_nothing_are_not_bought():
    gains = [np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.0, 1.0, 2.0, 2.0])]
    assert allocate(gains, [3, 3], 1000) == [1, 2]
    assert allocate(gains, [3, 4], 1000) == [1, 2]


def test_a_budget_below_the_least():
    with pytest.raises(ValueError, match="a budget of 9 is not enough for rank 1"):
        allocate([np.arange(3.0)] * 2, [5, 5], 9)

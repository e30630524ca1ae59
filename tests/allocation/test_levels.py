"""levels: the dynamic programme against all combinations."""

from __future__ import annotations

import itertools

import pytest
import torch

from liar_ext import InputError
from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation import levels as module
from liar_ext.allocation.levels import choose, levels


def total(table, chosen):
    """What the chosen level of each Site sums up to."""
    return sum(own[level] for own, level in zip(table, chosen, strict=True))


def enumerated(costs, losses, most):
    """The least sum of losses of all combinations that fit."""
    best = float("inf")
    for combination in itertools.product(*(range(len(own)) for own in costs)):
        if total(costs, combination) <= most:
            best = min(best, total(losses, combination))
    return best


def problem(seed: int, sites: int = 5, scale: int = 1):
    generator = torch.Generator().manual_seed(seed)
    costs, losses = [], []
    for site in range(sites):
        count = 3 + (seed + site) % 3
        steps = torch.randint(1, 40, (count,), generator=generator).cumsum(0) * scale
        costs.append(steps.tolist())
        falling = torch.rand(count, generator=generator, dtype=torch.float64).sort(descending=True)
        losses.append(falling.values.tolist())
    return costs, losses


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_combination_is_better(seed, share):
    # 1001 is more than a slot: the common divisor makes the slots exact
    costs, losses = problem(seed, scale=1001 if seed % 2 else 1)
    most = share * sum(max(own) for own in costs)
    found = choose(costs, losses, most)
    spent = total(costs, found)
    if sum(map(min, costs)) > most:
        assert found == [0] * len(costs)
        return
    assert spent <= most
    assert total(losses, found) == pytest.approx(enumerated(costs, losses, most), rel=1e-12)


def test_a_loss_that_is_not_a_number_is_refused():
    costs, losses = problem(0)
    losses[2][1] = float("nan")
    with pytest.raises(InputError, match="level 1 of choice 2 is NaN"):
        choose(costs, losses, 0.5 * sum(max(own) for own in costs))


def test_a_budget_of_few_slots_is_never_exceeded(monkeypatch):
    monkeypatch.setattr(module, "SLOTS", 50)
    for seed in range(6):
        costs, losses = problem(seed)
        costs = [[cost * 10 + 1 + place for place, cost in enumerate(own)] for own in costs]
        most = 0.6 * sum(max(own) for own in costs)
        found = choose(costs, losses, most)
        assert total(costs, found) <= most
        # what rounding may waste: one slot for each Site
        wasted = sum(max(own) for own in costs) / 50 * len(costs)
        worse = enumerated(costs, losses, most - 1.1 * wasted)
        assert total(losses, found) <= worse + 1e-12


@pytest.mark.parametrize("units", [1, 2, 7, 40, 41, 97, 1408, 11008])
def test_levels_rise_from_one_unit_to_all(units):
    found = levels(units)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, units)
    assert found == list(range(1, units + 1)) or len(found) >= module.LEVELS
    assert max(b - a for a, b in itertools.pairwise([0, *found])) <= max(1, units / 40 + 1)


def test_the_site_whose_error_rises_first_keeps_more():
    def falling(power: float) -> torch.Tensor:
        kept = torch.tensor(levels(80), dtype=torch.float64) / 80
        return (1 - kept) ** power

    budgets = [Budget("ffn", 80, 3, falling(1.0)), Budget("ffn", 80, 3, falling(3.0))]
    widths = ALLOCATIONS["levels"].widths(budgets, 0.5)
    assert sum(widths) == 80
    assert widths[0] > widths[1]

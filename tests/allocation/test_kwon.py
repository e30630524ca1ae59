"""kwon: against all subsets of units."""

from __future__ import annotations

import itertools

import pytest
import torch

from liar_ext.allocation import ALLOCATIONS, Budget


def problem(seed: int, heads: int = 2) -> list[Budget]:
    """Two layers of 3 groups of 2 columns, and 4 neurons: 14 units, 16384 sets."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    made = []
    for _ in range(2):
        if heads:
            made.append(Budget("heads", 3, 7, 4 * drawn(6)))
        made.append(Budget("ffn", 4, 2, drawn(4)))
    return made


def enumerated(budgets: list[Budget], most: float) -> float:
    """The largest sum of scores of all sets of units that fit and leave something everywhere."""
    options = []
    for budget in budgets:
        scores = budget.known.reshape(budget.units, -1).sum(1).tolist()
        options.append(
            [
                (sum(chosen), count * budget.cost)
                for count in range(1, budget.units + 1)
                for chosen in itertools.combinations(scores, count)
            ]
        )
    return max(
        sum(score for score, _ in sets)
        for sets in itertools.product(*options)
        if sum(cost for _, cost in sets) <= most + 1e-9
    )


def score(budgets: list[Budget], wanted: list[float]) -> float:
    """Of the best units of each Site, as many as are wanted."""
    total = 0.0
    for budget, units in zip(budgets, wanted, strict=True):
        scores = budget.known.reshape(budget.units, -1).sum(1).sort(descending=True).values
        total += float(scores[: int(units)].sum())
    return total


@pytest.mark.parametrize("heads", [True, False], ids=["both", "ffn"])
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_no_set_of_units_has_more_score_within_the_budget(seed, sparsity, heads):
    budgets = problem(seed, heads)
    most = sum(b.units * b.cost for b in budgets) * (1 - sparsity)
    wanted = ALLOCATIONS["kwon"].wanted(budgets, sparsity)
    assert all(units >= 1 and units == int(units) for units in wanted)
    assert sum(units * b.cost for units, b in zip(wanted, budgets, strict=True)) <= most + 1e-9
    assert score(budgets, wanted) == pytest.approx(enumerated(budgets, most))


def test_a_site_of_the_worst_units_keeps_its_best_one():
    poor = Budget("ffn", 5, 1, torch.full((5,), 1e-6, dtype=torch.float64))
    rich = Budget("ffn", 5, 1, torch.arange(1.0, 6.0, dtype=torch.float64))
    assert ALLOCATIONS["kwon"].wanted([poor, rich, rich], 0.6) == [1.0, 3.0, 2.0]


def test_heads_are_worth_what_they_cost():
    """A head of twice a neuron's score and cost is as good; a little more tips the scale."""
    neurons = torch.ones(10, dtype=torch.float64)
    for head, expected in ((1.9, [1.0, 8.0]), (2.1, [4.0, 2.0])):
        budgets = [
            Budget("heads", 4, 2, torch.full((4,), head, dtype=torch.float64)),
            Budget("ffn", 10, 1, neurons),
        ]
        assert ALLOCATIONS["kwon"].wanted(budgets, 8 / 18) == expected

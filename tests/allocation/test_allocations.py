"""Budgets into widths: met as closely as the grid allows, nobody emptied."""

from __future__ import annotations

import itertools

import pytest
import torch

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation.global_ranking import standardised


def budgets(seed: int, layers: int = 4, heads: bool = True) -> list[Budget]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(layers):
        scores = torch.rand(64, generator=generator, dtype=torch.float64) * (layer + 1)
        made.append(Budget("ffn", 64, 97, scores))
        if heads:
            columns = torch.rand(8 * 16, generator=generator, dtype=torch.float64)
            made.append(Budget("heads", 8, 1000 + layer % 2, columns))
    return made


def kept(problem: list[Budget], widths: list[int]) -> float:
    return sum(w * b.cost for w, b in zip(widths, problem, strict=True))


@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_no_single_step_on_the_grid_comes_closer(name, seed, sparsity, round_to):
    problem, allocation = budgets(seed), ALLOCATIONS[name]
    widths = allocation.widths(problem, sparsity, round_to)
    target = sum(b.units * b.cost for b in problem) * (1 - sparsity)
    error = abs(kept(problem, widths) - target)
    for index, budget in enumerate(problem):
        step = round_to if budget.kind == "ffn" else 1
        assert 1 <= widths[index] <= budget.units
        assert budget.kind == "heads" or widths[index] % round_to == 0
        if allocation.equal:
            continue
        for change in (-step, step):
            if step <= widths[index] + change <= budget.units:
                assert abs(kept(problem, widths) + change * budget.cost - target) >= error - 1e-6


def test_uniform_gives_every_layer_of_a_kind_the_same_width():
    problem = [
        Budget("ffn", 100, 7),
        Budget("heads", 4, 300),
        Budget("ffn", 100, 7),
        Budget("heads", 4, 300),
    ]
    widths = ALLOCATIONS["uniform"].widths(problem, 0.3)
    assert widths[0] == widths[2]
    assert widths[1] == widths[3]
    # 4 heads cannot lose 30 %: they lose one each, and the FFN makes up for the rest
    assert widths[1] == 3
    total = sum(b.units * b.cost for b in problem)
    assert kept(problem, widths) == pytest.approx(0.7 * total, abs=7)


def test_uniform_keeps_the_plain_fraction_where_it_fits():
    problem = [Budget("ffn", 1536, 769)] * 6
    assert ALLOCATIONS["uniform"].widths(problem, 0.5) == [768] * 6
    assert ALLOCATIONS["uniform"].widths(problem, 0.3, 64) == [1088] * 6


def test_the_dense_width_is_allowed_when_it_is_no_multiple():
    assert ALLOCATIONS["uniform"].widths([Budget("ffn", 100, 1)], 0.01, 64) == [100]


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_global_keeps_the_best_standardised_units(sparsity):
    """Against exhaustive search for the cut of the ranking that meets the budget best."""
    problem = budgets(7, layers=3, heads=False)
    z = [standardised(b) for b in problem]
    flat = sorted(
        ((float(value), site) for site, values in enumerate(z) for value in values), reverse=True
    )
    target = sum(b.units * b.cost for b in problem) * (1 - sparsity)
    best = min(range(len(flat) + 1), key=lambda n: abs(n * 97 - target))
    expected = [sum(site == s for _, site in flat[:best]) for s in range(len(problem))]
    assert ALLOCATIONS["global"].widths(problem, sparsity) == expected


def test_global_counts_the_cost_of_a_unit():
    cheap = Budget("ffn", 10, 1, torch.arange(10.0))
    dear = Budget("heads", 10, 100, torch.arange(10.0))
    widths = ALLOCATIONS["global"].widths([cheap, dear], 0.5)
    assert kept([cheap, dear], widths) == pytest.approx(505, abs=1)


def test_global_wants_the_best_unit_of_a_site_that_is_worst_everywhere():
    # two units far above 48 have a higher z than the best of four even ones
    peaked = Budget("ffn", 50, 1, torch.cat([torch.zeros(48), torch.ones(2)]))
    even = Budget("ffn", 4, 1, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert float(standardised(even).max()) < float(standardised(peaked)[-1])
    assert ALLOCATIONS["global"].wanted([even, peaked, peaked], 0.98) == [1, 1, 1]


def test_standardisation_is_over_columns_and_averaged_over_a_unit():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], dtype=torch.float64)
    z = (scores - scores.mean()) / scores.std()
    assert torch.allclose(standardised(Budget("heads", 3, 1, scores)), z.reshape(3, 2).mean(1))
    assert torch.allclose(standardised(Budget("ffn", 6, 1, scores)), z)


@pytest.mark.parametrize("scores", [torch.ones(8), torch.zeros(8)])
def test_equal_scores_are_no_failure(scores):
    problem = [Budget("ffn", 8, 5, scores), Budget("ffn", 8, 5, scores)]
    widths = ALLOCATIONS["global"].widths(problem, 0.5)
    assert kept(problem, widths) == 40
    assert min(widths) >= 1


def test_one_unit_sites_survive_any_sparsity():
    for name, sparsity in itertools.product(ALLOCATIONS, (0.5, 0.999)):
        problem = [
            Budget("heads", 1, 50, torch.tensor([-9.0])),
            Budget("ffn", 30, 2, torch.rand(30)),
        ]
        assert ALLOCATIONS[name].widths(problem, sparsity)[0] == 1

"""Budgets into widths: met as closely as the grid allows, nobody emptied."""

from __future__ import annotations

import random

import pytest
import torch

from liar_ext import InputError
from liar_ext.allocation import ALLOCATIONS, Allocation, Budget, check_reachable
from liar_ext.allocation.global_ranking import standardised
from liar_ext.allocation.levels import levels
from liar_ext.allocation.search import Problem
from liar_ext.allocation.space import Space
from liar_ext.engine.search import level_grid


def finding(survey: str | None, units: int, columns: int, scale: int, generator) -> object:
    """Of the shape and in the range of what a survey finds."""

    def drawn(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    return {
        None: lambda: None,
        "scores": lambda: drawn(columns) * scale,
        "spectra": lambda: 2 + 3 * drawn(7),
        "influence": lambda: 0.5 * drawn(1),
        "levels": lambda: (
            torch.cat([drawn(len(levels(units)) - 1), torch.zeros(1)]).sort(descending=True).values
        ),
        # each Site as if it were alone in its layer
        "besa": lambda: torch.stack(
            [
                torch.cat([torch.zeros(1), drawn(len(levels(units, 16)) - 1)]).sort().values,
                torch.tensor(levels(units, 16)[::-1], dtype=torch.float64),
            ],
            1,
        ),
    }[survey]()


def budgets(seed: int, layers: int = 4, heads: bool = True, survey="scores") -> list[Budget]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(layers):
        found = finding(survey, 64, 64, layer + 1, generator)
        made.append(Budget("ffn", 64, 97, found))
        if heads:
            found = finding(survey, 8, 8 * 16, 1, generator)
            made.append(Budget("heads", 8, 1000 + layer % 2, found))
    return made


def kept(problem: list[Budget], widths: list[int]) -> float:
    return sum(w * b.cost for w, b in zip(widths, problem, strict=True))


@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.77, 0.82])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_no_single_step_on_the_grid_comes_closer(name, seed, sparsity, round_to):
    allocation = ALLOCATIONS[name]
    problem = budgets(seed, survey=allocation.survey)
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


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_one_unit_sites_survive_any_sparsity(name):
    survey = ALLOCATIONS[name].survey
    generator = torch.Generator().manual_seed(0)
    problem = [
        Budget("heads", 1, 5, finding(survey, 1, 1, -9, generator)),
        Budget("ffn", 3000, 2, finding(survey, 3000, 3000, 1, generator)),
    ]
    for sparsity in (0.5, 0.998):
        assert ALLOCATIONS[name].widths(problem, sparsity)[0] == 1


@pytest.mark.parametrize("round_to", [1, 16])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_more_than_can_be_removed_is_refused_with_the_most_that_can(name, round_to):
    problem = budgets(0, survey=ALLOCATIONS[name].survey)
    total = sum(b.units * b.cost for b in problem)
    least = sum((round_to if b.kind == "ffn" else 1) * b.cost for b in problem)
    with pytest.raises(InputError, match="at most 0\\.\\d+ can be removed") as caught:
        ALLOCATIONS[name].widths(problem, 0.99, round_to)
    most = float(str(caught.value).partition("at most ")[2].split()[0])
    assert 0 <= 1 - least / total - most < 1e-4
    assert ("multiples of 16" in str(caught.value)) == (round_to == 16)
    widths = ALLOCATIONS[name].widths(problem, most, round_to)
    assert kept(problem, widths) == pytest.approx(least, abs=1e-4 * total)


def test_nothing_to_remove_is_said_with_its_reason():
    one_group = [Budget("heads", 1, 5)] * 3
    for budgets_, round_to, reason in (
        (one_group, 1, "single unit .* add ffn to --target"),
        ([*one_group, Budget("ffn", 8, 1)], 16, "lower --round-to"),
    ):
        with pytest.raises(InputError, match=reason):
            check_reachable(budgets_, 0.3, round_to)
    check_reachable([*one_group, Budget("ffn", 8, 1)], 0.3)


def test_widths_that_a_search_has_found_move_by_neurons_not_by_heads():
    budgets_ = [Budget("heads", 4, 144), Budget("ffn", 512, 3)] * 5
    found = [1, 299, 4, 85, 4, 256, 3, 171, 1, 299]
    widths = ALLOCATIONS["evolution"].widths(budgets_, 0.5, 1, found)
    assert widths[::2] == found[::2]
    assert all(abs(a - b) <= 6 for a, b in zip(widths, found, strict=True))
    assert kept(budgets_, widths) == 0.5 * kept(budgets_, [b.units for b in budgets_])


@pytest.mark.parametrize("round_to", [1, 16, 64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_widths_that_a_search_has_found_come_as_close_on_any_grid(seed, round_to):
    """As the way does that takes the closest step first."""
    budgets_ = [Budget("heads", 4, 144), Budget("ffn", 512, 3)] * 5
    total = kept(budgets_, [b.units for b in budgets_])
    drawn = random.Random(seed)
    problem = Problem(budgets_, 0.5, [level_grid(b, round_to) for b in budgets_], 1, 0)
    space = Space(problem)
    wishes = [drawn.uniform(0.1, 0.6) * b.units for b in budgets_]
    found = [float(units) for units in space.candidate(space.place(wishes))]
    widths = ALLOCATIONS["evolution"].widths(budgets_, 0.5, round_to, found)
    plain = Allocation("plain", lambda *_: found, None, equal=False)
    closest = plain.widths(budgets_, 0.5, round_to)
    error, least = (abs(kept(budgets_, own) - 0.5 * total) for own in (widths, closest))
    assert error <= least

    def moved(own: list[int]) -> float:
        return sum(abs(a - f) / b.units for a, f, b in zip(own, found, budgets_, strict=True))

    assert moved(widths) <= moved(closest)


def test_a_survey_is_asked_for_by_a_name_that_there_is():
    from liar_ext.survey import SURVEYS

    assert {a.survey for a in ALLOCATIONS.values()} == {None, *SURVEYS}

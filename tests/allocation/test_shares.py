"""alpha and influence: shares in proportion, capped, and the budget met."""

from __future__ import annotations

import math

import pytest
import torch

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation.alpha import SPREAD
from liar_ext.allocation.influence import MOST, TEMPERATURE
from liar_ext.allocation.shares import capped


def shares(problem: list[Budget], wanted: list[float]) -> list[float]:
    return [1 - kept / b.units for kept, b in zip(wanted, problem, strict=True)]


def removed(problem: list[Budget], wanted: list[float]) -> float:
    total = sum(b.units * b.cost for b in problem)
    return 1 - sum(k * b.cost for k, b in zip(wanted, problem, strict=True)) / total


def layers(findings: list[float], *, repeat: int = 1) -> list[Budget]:
    """Two Sites a layer, of one finding and of different sizes."""
    made = []
    for value in findings:
        known = torch.full((repeat,), value, dtype=torch.float64)
        made += [Budget("heads", 9, 700, known), Budget("ffn", 301, 55, known)]
    return made


def by_bisection(weights, sizes, caps, total):
    """The definition: the c at which `min(c w, cap)` removes the total."""

    def taken(scale: float) -> float:
        return sum(s * min(scale * w, c) for w, s, c in zip(weights, sizes, caps, strict=True))

    low, high = 0.0, 1.0
    while taken(high) < total:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) < total else (low, middle)
    return [min(high * w, c) for w, c in zip(weights, caps, strict=True)]


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_capped_shares_are_those_of_the_definition(seed, share):
    generator = torch.Generator().manual_seed(seed)
    weights, sizes, caps = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    weights = weights**4
    total = share * float((sizes * caps).sum())
    found = capped(weights, sizes, caps, total)
    expected = by_bisection(weights.tolist(), sizes.tolist(), caps.tolist(), total)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert float((sizes * found).sum()) == pytest.approx(total)


def test_caps_that_allow_less_are_returned():
    ones = torch.ones(3, dtype=torch.float64)
    assert capped(ones, ones, 0.2 * ones, 2.0).tolist() == [0.2, 0.2, 0.2]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_alpha_is_linear_in_the_exponent(sparsity):
    exponents = [2.0, 3.0, 2.5, 4.0]
    problem = layers(exponents, repeat=7)
    wanted = ALLOCATIONS["alpha"].wanted(problem, sparsity)
    rates = [1 - SPREAD + 2 * SPREAD * (a - 2.0) / 2.0 for a in exponents]
    # layers of one size: the mean is the budget. 0.7 · 1.3 is more than 8 of 9 heads
    expected = [r * sparsity / (sum(rates) / 4) for r in rates for _ in range(2)]
    if max(expected) <= 8 / 9:
        assert shares(problem, wanted) == pytest.approx(expected)
    assert removed(problem, wanted) == pytest.approx(sparsity)


@pytest.mark.parametrize("sparsity", [0.85, 0.88])
def test_what_alpha_cannot_take_from_one_layer_it_takes_from_the_others(sparsity):
    problem = layers([1.0, 5.0, 9.0])
    wanted = ALLOCATIONS["alpha"].wanted(problem, sparsity)
    assert all(1 - 1e-9 <= k <= b.units for k, b in zip(wanted, problem, strict=True))
    assert removed(problem, wanted) == pytest.approx(sparsity)
    # the lightest tail, to the last unit
    assert wanted[-2:] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("findings", [[3.0, 3.0], [3.0], [float("nan"), 3.0], [float("nan")] * 2])
def test_without_differences_alpha_is_uniform(findings):
    problem = layers(findings)
    wanted = ALLOCATIONS["alpha"].wanted(problem, 0.3)
    assert shares(problem, wanted) == pytest.approx([0.3] * len(problem))


def test_a_linear_without_a_spectrum_does_not_count_in_its_layer():
    one = torch.tensor([2.0, float("nan"), 4.0], dtype=torch.float64)
    two, three = (torch.full((3,), value, dtype=torch.float64) for value in (3.0, 5.0))
    whole = [Budget("ffn", 1000, 3, f) for f in (one, three)]
    mean = [Budget("ffn", 1000, 3, f) for f in (two, three)]
    alpha = ALLOCATIONS["alpha"]
    assert alpha.wanted(whole, 0.4) == alpha.wanted(mean, 0.4)


def test_influence_is_the_papers_softmax_where_nothing_is_capped():
    influence = [0.31, 0.22, 0.2, 0.35]
    problem = layers(influence)
    wanted = ALLOCATIONS["influence"].wanted(problem, 0.3)
    powers = [math.exp(-value / TEMPERATURE) for value in influence]
    expected = [4 * 0.3 * p / sum(powers) for p in powers for _ in range(2)]
    assert max(expected) < MOST
    assert shares(problem, wanted) == pytest.approx(expected)


@pytest.mark.parametrize("sparsity", [0.45, 0.6, 0.79])
def test_no_layer_loses_more_than_stated(sparsity):
    problem = layers([0.9, 0.01, 0.5, 0.02])
    wanted = ALLOCATIONS["influence"].wanted(problem, sparsity)
    found = shares(problem, wanted)
    assert max(found) == pytest.approx(MOST)
    assert removed(problem, wanted) == pytest.approx(sparsity)
    assert found[0] == pytest.approx(min(found))


def test_above_that_share_all_lose_the_same_as_far_as_they_can():
    problem = layers([0.9, 0.01, 0.5])
    found = shares(problem, ALLOCATIONS["influence"].wanted(problem, 0.93))
    assert found[::2] == pytest.approx([8 / 9] * 3)
    assert len({round(share, 9) for share in found[1::2]}) == 1
    assert removed(problem, ALLOCATIONS["influence"].wanted(problem, 0.93)) == pytest.approx(0.93)

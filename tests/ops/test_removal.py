"""Removal against its definition: every loss by a solve, every choice by enumeration."""

from __future__ import annotations

import pytest
import torch

from liar_ext.errors import NumericalError
from liar_ext.ops.removal import (
    Tableau,
    best_reference,
    columns,
    greedy_reference,
    loss_reference,
)

# float64 with conditions up to about 1e4: 1e-16 · 1e4 · columns, and slack
TOLERANCE = 1e-9


def system(n: int, outputs: int = 7, seed: int = 0):
    """A (n, n) with a ridge, and W (outputs, n)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, dtype=torch.float64, generator=generator)
    x = torch.randn(20 * n, n, dtype=torch.float64, generator=generator) @ mixing
    matrix = x.T @ x / len(x)
    matrix.diagonal().add_(1e-4 * matrix.diagonal().mean())
    return matrix, torch.randn(outputs, n, dtype=torch.float64, generator=generator)


def tableau(matrix, weight, width):
    return Tableau(torch.linalg.inv(matrix), weight, width)


def dropped_loss(found: Tableau, matrix, weight) -> float:
    gone = (~found.kept).nonzero().flatten().tolist()
    return float(loss_reference(matrix, weight, columns(gone, found.width)))


@pytest.mark.parametrize(("n", "width"), [(11, 1), (15, 3), (14, 2), (9, 1)])
def test_the_loss_is_what_least_squares_leaves(n, width):
    # the definition itself, on the objective: ‖(W' − ...)‖ of a solve by normal equations
    matrix, weight = system(n)
    units = list(range(0, n // width, 2))
    drop = columns(units, width)
    keep = torch.tensor([j for j in range(n) if j not in drop.tolist()])
    change = weight[:, drop] @ torch.linalg.solve(matrix[keep][:, keep], matrix[keep][:, drop]).T
    whole = torch.zeros_like(weight)
    whole[:, keep], whole[:, drop] = change, -weight[:, drop]
    expected = ((whole @ matrix) * whole).sum()
    assert torch.allclose(loss_reference(matrix, weight, drop), expected, rtol=TOLERANCE)


@pytest.mark.parametrize(("n", "width"), [(11, 1), (15, 3), (14, 2)])
def test_pivots_keep_the_tableau_what_it_is(n, width):
    matrix, weight = system(n)
    found = tableau(matrix, weight, width)
    last = n // width - 1
    for units in ([0, 2], [1], [2], [last, 3]):  # unit 2 leaves and returns
        found.move(torch.tensor(units))
        kept = columns(found.kept.nonzero().flatten().tolist(), width)
        gone = columns((~found.kept).nonzero().flatten().tolist(), width)
        inverse = torch.linalg.inv(matrix[kept][:, kept])
        q = inverse @ matrix[kept][:, gone]
        rest = matrix[gone][:, gone] - matrix[gone][:, kept] @ q
        close = {"rtol": TOLERANCE, "atol": TOLERANCE * float(inverse.abs().max())}
        assert torch.allclose(found.matrix[kept][:, kept], -inverse, **close)
        assert torch.allclose(found.matrix[kept][:, gone], q, **close)
        assert torch.allclose(found.matrix[gone][:, gone], rest, **close)
        repaired = weight[:, kept] + weight[:, gone] @ q.T
        assert torch.allclose(found.rows[:, kept], repaired, **close)
        assert torch.allclose(found.rows[:, gone], weight[:, gone] @ rest, **close)
        expected = dropped_loss(found, matrix, weight)
        assert found.loss == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("n", "width"), [(11, 1), (15, 3)])
def test_costs_are_changes_of_the_loss(n, width):
    matrix, weight = system(n)
    found = tableau(matrix, weight, width)
    found.move(torch.tensor([1, 3]))
    costs, before = found.costs(), found.loss
    for unit in range(n // width):
        other = tableau(matrix, weight, width)
        other.move(torch.tensor([1, 3]))
        other.move(torch.tensor([unit]))
        assert abs(other.loss - before) == pytest.approx(float(costs[unit]), rel=1e-7)


@pytest.mark.parametrize(("n", "width", "keep"), [(12, 1, 5), (11, 1, 10), (15, 3, 2), (14, 2, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_removal_is_the_definition(n, width, keep, seed):
    matrix, weight = system(n, seed=seed)
    found = tableau(matrix, weight, width)
    order, costs = found.remove(n // width - keep)
    assert order.tolist() == greedy_reference(matrix, weight, width, keep)
    assert found.loss == pytest.approx(float(costs.sum()), rel=1e-7) or bool(
        (costs.diff() == 0).any()  # raised to what went before
    )
    assert bool((costs.diff() >= 0).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_of_several_removes_what_single_ones_would(seed):
    # all columns are candidates, so a step is greedy removal itself
    matrix, weight = system(33, seed=seed)
    order, _ = tableau(matrix, weight, 1).remove(16, steps=2)
    single, _ = tableau(matrix, weight, 1).remove(16)
    assert order.tolist() == single.tolist()


def test_steps_do_not_take_twins_together():
    # either of two equal columns costs nothing, both together cost all they carry
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, dtype=torch.float64, generator=generator)
    x[:, 1] = x[:, 0] + 1e-3 * torch.randn(500, dtype=torch.float64, generator=generator)
    matrix = x.T @ x / 500 + 1e-9 * torch.eye(8, dtype=torch.float64)
    weight = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    weight[:, :2] *= 100
    found = tableau(matrix, weight, 1)
    found.remove(4, steps=1)
    assert int(found.kept[:2].sum()) == 1


@pytest.mark.parametrize(("n", "width", "keep"), [(11, 1, 6), (10, 1, 3), (12, 2, 3), (12, 3, 2)])
def test_exchanges_come_close_to_the_best_selection(n, width, keep):
    ratios, exact = [], 0
    for seed in range(8):
        matrix, weight = system(n, seed=seed)
        chosen = best_reference(matrix, weight, width, keep)
        rest = [unit for unit in range(n // width) if unit not in chosen]
        best = float(loss_reference(matrix, weight, columns(rest, width)))
        found = tableau(matrix, weight, width)
        found.remove(n // width - keep)
        greedy = found.loss
        found.exchange(3)
        assert int(found.kept.sum()) == keep
        assert found.loss <= greedy * (1 + 1e-12)
        assert found.loss == pytest.approx(dropped_loss(found, matrix, weight), rel=1e-7)
        ratios.append(found.loss / best)
        exact += ratios[-1] < 1 + 1e-7
    assert min(ratios) > 1 - 1e-7
    # of 8 seeds 4 to 8 were exact, and the worst 15 % from it
    assert exact >= 4
    assert max(ratios) < 1.2


def test_a_block_that_is_not_positive_definite_is_an_error():
    matrix, weight = system(6)
    found = Tableau(-torch.linalg.inv(matrix), weight, 1)
    with pytest.raises(NumericalError, match="not positive definite"):
        found.move(torch.tensor([2]))

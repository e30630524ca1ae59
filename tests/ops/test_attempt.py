"""Every implementation of one solve attempt against its float64 definition."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms, covariance

from liar_ext.ops import attempt, attempt_reference
from liar_ext.ops import factor as factors
from liar_ext.ops.attempt import solve_attempt
from liar_ext.ops.factor import LibraryFactor, Scaled, finish, probes

DOUBLE = torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def systems(batch: int, size: int, columns: int, condition: float = 1e3, means: bool = True):
    """Arguments of `attempt`: systems of different scale."""
    matrix = torch.stack([(i + 1) * covariance(size, condition, seed=i) for i in range(batch)])
    right = torch.randn(batch, size, columns, dtype=DOUBLE)
    strength = torch.linspace(0.0, 1e-2, batch, dtype=DOUBLE)
    kept = torch.randn(batch, size, dtype=DOUBLE) if means else None
    dropped = torch.randn(batch, columns, dtype=DOUBLE) if means else None
    return matrix, right, strength, kept, dropped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("batch", "size", "columns"),
    [(1, 1, 1), (3, 2, 5), (2, 33, 0), (4, 64, 64), (3, 128, 40), (2, 130, 9), (1, 600, 3)],
)
def test_an_attempt_is_the_definition(device, working, batch, size, columns):
    arguments = systems(batch, size, columns)
    expected = attempt_reference(*arguments)
    found = attempt(*(v.to(device) for v in arguments), working)
    found = type(found)(*(v.cpu() for v in found))
    # condition 1e3 of a scaled matrix, float64 or refined to 1e-10
    bound = 1e-11 if working == torch.float64 else 1e-7
    if columns:
        assert_close_rms(found.solution, expected.solution, bound)
        assert_close_rms(found.shift, expected.shift, bound)
    assert found.solution.shape == expected.solution.shape
    assert not found.info.any()
    assert_close_rms(found.pivot, expected.pivot, 1e-9 if working == torch.float64 else 1e-2)
    assert bool((found.error <= 1e-10).all())
    for ours, true in (
        (found.largest, expected.largest),
        (1 / found.smallest, 1 / expected.smallest),
    ):
        assert bool((ours <= true * 1.01).all()), "power iteration comes from below"
        assert bool((ours >= true / 3).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_factorisation_is_an_info_and_leaves_its_neighbours(device):
    matrix, right, strength, _, _ = systems(4, 40, 3)
    matrix[1] -= 0.5 * torch.eye(40, dtype=DOUBLE) * matrix[1].diagonal().mean()
    matrix[2, 7, 3] = matrix[2, 3, 7] = float("nan")
    expected = attempt_reference(matrix, right, strength)
    found = attempt(matrix.to(device), right.to(device), strength.to(device))
    assert found.info[[0, 3]].tolist() == [0, 0]
    assert found.info[1].item() == expected.info[1].item() > 0
    assert found.info[2].item() != 0 or not bool(found.error[2] <= 1e-10)
    for good in (0, 3):
        assert_close_rms(found.solution[good].cpu(), expected.solution[good], 1e-11)


def test_the_operator_passes_opcheck():
    matrix, right, strength, kept, dropped = systems(2, 9, 4)
    for means in ((kept, dropped), (None, None)):
        for working in (torch.float64, torch.float32):
            torch.library.opcheck(solve_attempt, (matrix, right, strength, *means, working))


class Perturbed(LibraryFactor):
    """Solutions that are wrong by a known factor, and stay so under refinement."""

    def substitute(self, right):
        return super().substitute(right) * 1.25


@pytest.mark.parametrize("columns", [3, 200], ids=["few columns", "many columns"])
@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_error_is_the_residual_of_what_is_returned(working, columns):
    matrix, right, strength, _, _ = systems(2, 40, columns)
    system = Scaled.of(matrix, strength)
    found = finish(system, Perturbed.of(system.tensor(working)), right, None, None, working)
    scaled, scale = system.tensor(DOUBLE), system.scale
    inner, target = found.solution / scale, right * scale
    norm = torch.linalg.matrix_norm(scaled, 2) * inner.flatten(1).norm(dim=1)
    true = (scaled @ inner - target).flatten(1).norm(dim=1) / (norm + target.flatten(1).norm(dim=1))
    # eight random combinations stand for many columns, and the norm of the matrix is an estimate
    assert bool((true > 1e-7).all()), "far above what rounding leaves"
    assert bool(((found.error / true).log().abs() < 0.4).all())


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=str)
@pytest.mark.parametrize("block", [64, 512], ids=["blocks", "one block"])
def test_substitution_by_products_is_substitution(monkeypatch, block, dtype):
    """As it is on a GPU, and everywhere for a few columns."""
    matrix, right, *_ = systems(3, 150, 70)
    scaled = matrix + 0.1 * torch.eye(150)
    whole = LibraryFactor.of(scaled.clone(), products=False).substitute(right.clone())
    monkeypatch.setattr(factors, "BLOCK", block)
    bound = 1e-10 if dtype == DOUBLE else 1e-4
    factor = LibraryFactor.of(scaled.to(dtype), products=True)
    right = right.to(dtype)
    for _ in range(2):  # with and without the inverted blocks at hand
        assert_close_rms(factor.substitute_few(right), whole, bound)
    found = factor.substitute(right)
    assert found.data_ptr() == right.data_ptr(), "in place"
    assert_close_rms(found, whole, bound)
    assert torch.equal(factor.info, torch.zeros(3, dtype=torch.int32))


def test_probes_are_no_two_alike_and_the_same_every_time():
    first = probes(200, 8, torch.zeros(1, dtype=DOUBLE))
    assert torch.equal(first, probes(200, 8, torch.zeros(1, dtype=DOUBLE)))
    assert first.shape == (1, 200, 8)
    unit = first[0] / first[0].norm(dim=0)
    cosine = (unit.T @ unit).fill_diagonal_(0.0)
    # two random directions of 200 dimensions: 1/sqrt(200) = 0.07
    assert float(cosine.abs().max()) < 0.3


@pytest.mark.gpu
def test_an_attempt_can_be_captured_in_a_graph_and_replayed():
    arguments = [v.cuda() for v in systems(4, 96, 8)]
    expected = attempt(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attempt(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attempt(*arguments)
    arguments[1].mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert_close_rms(captured.solution.cpu(), 2 * expected.solution.cpu(), 1e-12)

"""The panel kernel and the blocked factorisation around it, emulated and on a device."""

from __future__ import annotations

import liar_cuda_host
import pytest
import torch
from liar_systems import conditioned, covariances, lower_only
from liar_testing import assert_close_rms

from liar_ext.ops import _native_solve, blocked

PRECISIONS = (torch.float64, torch.float32)
# times the condition, at most 1e3 below, and a few roundings
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-3}


def scaled(matrix, strength=1e-3):
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = (diagonal + strength * diagonal.mean(-1, keepdim=True)).rsqrt()
    matrix = matrix * scale[..., None] * scale[..., None, :]
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return matrix


def panel(place, block, first=0, info=None, pivot=None):
    """The panel on a poisoned block inside a larger allocation."""
    batch, size = block.shape[:2]
    whole = place(torch.full((batch, size + 3, size + 5), torch.nan, dtype=block.dtype))
    inside, around = whole[:, 2 : 2 + size, 1 : 1 + size], whole.clone()
    inside.copy_(place(block))
    wide = place(torch.full((batch, size, size + 7), torch.nan, dtype=block.dtype))
    inverse = wide[:, :, :size]
    info = place(torch.zeros(batch, dtype=torch.int32) if info is None else info)
    pivot = place(torch.full((batch,), torch.inf).double() if pivot is None else pivot)
    _native_solve.panel(inside, inverse, info, pivot, first)
    assert wide[:, :, size:].isnan().all()
    around[:, 2 : 2 + size, 1 : 1 + size] = inside
    assert torch.equal(around.isnan(), whole.isnan())
    return inside.cpu(), inverse.cpu(), info.cpu(), pivot.cpu()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 17, 31, 32, 33, 64, 65, 96, 127, 128])
def test_the_panel_gives_the_factor_and_its_inverse(place, size, dtype):
    batch = 3 if size < 64 else 1
    matrix = scaled(covariances(batch, size))
    lower, inverse, info, pivot = panel(place, lower_only(matrix).to(dtype))
    expected = torch.linalg.cholesky(matrix)
    assert_close_rms(lower.tril(), expected, TOLERANCE[dtype])
    above = torch.ones(size, size, dtype=torch.bool).triu(1)
    assert lower[:, above].isnan().all()
    assert (inverse[:, above] == 0).all()
    identity = torch.eye(size, dtype=torch.float64).expand(batch, size, size)
    assert_close_rms(inverse.double() @ expected, identity, TOLERANCE[dtype])
    assert info.tolist() == [0] * batch
    smallest = expected.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    assert torch.allclose(pivot, smallest, rtol=TOLERANCE[dtype])


def test_the_first_failure_and_the_smallest_pivot_of_all_panels_are_kept(place):
    matrix = scaled(covariances(4, 40))
    matrix[1, 20, 20] = -1.0
    matrix[2, 30, 30] = torch.nan
    _, _, info, pivot = panel(
        place,
        matrix,
        first=128,
        info=torch.tensor([0, 0, 7, 9], dtype=torch.int32),
        pivot=torch.tensor([1e-9, 1e-9, -3.0, -2.0], dtype=torch.float64),
    )
    assert info.tolist() == [0, 149, 7, 9]
    assert pivot[[0, 2, 3]].tolist() == [1e-9, -3.0, -2.0]
    assert pivot[1] < 0


def test_no_order_of_the_threads_changes_a_bit_of_a_panel(emulated):
    matrix = scaled(covariances(1, 100))
    results = []
    for order in liar_cuda_host.ORDERS:
        emulated.order(*order)
        lower, inverse = matrix.clone(), torch.full_like(matrix, torch.nan)
        info, pivot = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.float64)
        _native_solve.panel(lower, inverse, info, pivot, 0)
        results.append((lower, inverse, pivot))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_panel_fits_devices_with_less_shared_memory(emulated):
    matrix = scaled(covariances(1, 128))
    expected = torch.linalg.cholesky(matrix)
    for shared in (166912, 131072):
        emulated.device(capability=80, shared=shared)
        lower, inverse = matrix.clone(), torch.full_like(matrix, torch.nan)
        info, pivot = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.float64)
        _native_solve.panel(lower, inverse, info, pivot, 0)
        assert_close_rms(lower.tril(), expected, TOLERANCE[torch.float64])
        assert_close_rms(inverse, torch.linalg.inv(expected), TOLERANCE[torch.float64])


def test_bad_panel_arguments_are_named(emulated):
    matrix = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    info, pivot = torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.float64)
    wide = torch.zeros(2, 129, 129)
    for arguments, message in (
        ((wide, wide, info, pivot), "at most 128 rows; got 129"),
        ((matrix.half(), matrix, info, pivot), "must be float64 or float32; got torch.float16"),
        ((matrix, matrix.float(), info, pivot), r"inverse must be \(2, 4, 4\) torch.float64"),
        ((matrix, matrix.mT, info, pivot), "column stride must be 1"),
        ((matrix, matrix.clone(), info.long(), pivot), r"info must be \(2,\) torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            _native_solve.panel(*arguments, 0)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("size", "block"), [(100, 128), (129, 128), (200, 64), (300, 128)])
def test_blocked_factor_and_substitution_meet_the_library(place, size, block, dtype):
    matrix, true = scaled(covariances(2, size)), torch.randn(2, size, 9, dtype=torch.float64)
    given = place(lower_only(matrix).to(dtype))
    before = given.clone()
    factor = blocked.factor(given, block=block)
    assert torch.equal(given.isnan(), before.isnan())
    expected = torch.linalg.cholesky(matrix)
    assert_close_rms(factor.lower.cpu().tril(), expected, TOLERANCE[dtype])
    assert factor.info.tolist() == [0, 0]
    smallest = expected.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    assert torch.allclose(factor.pivot.cpu(), smallest, rtol=TOLERANCE[dtype])
    for right in (true[:, :, :1], true, true[:, :, :0]):
        found = factor.substitute(place((matrix @ right).to(dtype)))
        assert found.dtype == dtype
        assert_close_rms(found.cpu(), right, TOLERANCE[dtype])


def test_a_failure_in_a_later_block_is_counted_in_rows_of_the_whole(place):
    matrix = scaled(covariances(3, 290))
    matrix[0, 200, 200] = 0.1
    matrix[1, 270, 40] = torch.nan
    expected = torch.linalg.cholesky_ex(matrix[0]).info.item()
    assert 128 < expected <= 256
    factor = blocked.factor(place(matrix))
    assert factor.info.tolist() == [expected, 271, 0]
    good = torch.linalg.cholesky(matrix[2])
    assert_close_rms(factor.lower[2].cpu().tril(), good, TOLERANCE[torch.float64])
    right = torch.randn(3, 290, 2, dtype=torch.float64)
    found = factor.substitute(place(right)).cpu()
    assert found[:2].isnan().any(2).any(1).all()
    assert_close_rms(found[2], torch.cholesky_solve(right[2], good), 1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_the_blocked_solve_is_as_accurate_as_the_library_s(place, condition):
    matrix, true = conditioned(1, 200, condition), torch.randn(1, 200, 5, dtype=torch.float64)
    right = matrix @ true
    found = blocked.factor(place(matrix)).substitute(place(right)).cpu()
    library = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
    # inverted diagonal blocks cost a small factor, not digits
    assert (found - true).norm() <= 10 * (library - true).norm() + 1e-14 * condition


def test_blocked_arguments_are_checked(emulated):
    with pytest.raises(ValueError, match=r"\(batch, s, s\); got \(3, 4\)"):
        blocked.factor(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        blocked.factor(torch.zeros(1, 4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="block must be 1 to 128; got 129"):
        blocked.factor(torch.zeros(1, 4, 4), block=129)
    empty = blocked.factor(torch.zeros(2, 0, 0))
    assert empty.substitute(torch.zeros(2, 0, 3)).shape == (2, 0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_1024_rows_blocked_in_a_graph_on_a_device(dtype):
    matrix, true = scaled(covariances(4, 1024)), torch.randn(4, 1024, 64, dtype=torch.float64)
    given, right = matrix.to("cuda", dtype), (matrix @ true).to("cuda", dtype)
    expected = blocked.factor(given).substitute(right)
    assert_close_rms(expected, true, TOLERANCE[dtype] * 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = blocked.factor(given).substitute(right)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_close_rms(captured, expected, 1e-10 if dtype == torch.float64 else 1e-5)

"""The inverse in place, by LAPACK and by blocks, against the definition."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.errors import NumericalError
from liar_ext.ops.inverse import from_factor_, inverse_


def system(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size + 1, size, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, 2, size, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("block", [1, 5, 16, 512])
@pytest.mark.parametrize("size", [1, 2, 5, 33, 80])
def test_blocks_make_what_a_library_makes(size, block):
    matrix = system(size)
    lower = torch.linalg.cholesky(matrix)
    place = lower.data_ptr()
    found = from_factor_(lower, block)
    assert found.data_ptr() == place
    assert_close_rms(found @ matrix, torch.eye(size, dtype=torch.float64), 1e-8)
    assert_close_rms(found, torch.linalg.inv(matrix), 1e-9)
    assert torch.equal(found, found.T)


def test_blocks_may_lie_by_columns():
    by_columns, by_rows = (torch.linalg.cholesky(system(40)).clone() for _ in range(2))
    by_rows = by_rows.contiguous()
    assert by_rows.stride() != by_columns.stride()
    assert_close_rms(from_factor_(by_columns, 16), from_factor_(by_rows, 16), 1e-12)


@pytest.mark.parametrize("strength", [0.0, 1e-2])
@pytest.mark.parametrize("size", [1, 7, 600])
def test_the_inverse_takes_the_place_of_the_system(size, strength):
    matrix = system(size)
    expected = torch.linalg.inv(matrix + strength * torch.eye(size, dtype=torch.float64))
    place = matrix.data_ptr()
    found = inverse_(matrix, strength, 1e-16)
    assert found.data_ptr() == place
    assert found.is_contiguous()
    assert_close_rms(found, expected, 1e-9)


def test_dead_columns_are_zero_and_leave_the_others_alone():
    matrix = system(9)
    dead = torch.tensor([0, 4, 8])
    live = torch.tensor([1, 2, 3, 5, 6, 7])
    matrix[dead], matrix[:, dead] = 0.0, 0.0
    expected = torch.linalg.inv(matrix[live][:, live] + 0.1 * torch.eye(6, dtype=torch.float64))
    found = inverse_(matrix, 0.1, 1e-16)
    assert_close_rms(found[live][:, live], expected, 1e-10)
    assert not found[dead].any()
    assert not found[:, dead].any()


def test_what_has_no_inverse_is_refused():
    twins = system(8)
    twins[:, 1], twins[1] = twins[:, 0].clone(), twins[0].clone()
    with pytest.raises(NumericalError, match="no inverse|no usable inverse"):
        inverse_(twins, 0.0, 1e-7)
    with pytest.raises(NumericalError, match="not positive definite at pivot 1"):
        inverse_(-system(5), 0.0, 1e-16)
    with pytest.raises(NumericalError):
        inverse_(system(5) * float("nan"), 0.0, 1e-16)

"""The ladder: what it accepts is accurate, what it raises it says, what it cannot do it refuses."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.errors import NumericalError
from liar_ext.ops.solve import LADDER_STEPS, RECORD_BYTES, Diagnostics, ridge_solve


def covariance(size: int, condition: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -float(torch.tensor(condition).log10()), size, dtype=torch.float64)
    made = (basis * spectrum) @ basis.T
    return (made + made.T) / 2


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 3, 64, 151])
def test_the_solution_is_the_definition(size, precision):
    matrix, right = covariance(size, 1e3), torch.randn(size, 7, dtype=torch.float64)
    strength = 1e-2 * float(matrix.diagonal().mean())
    found, how = ridge_solve(matrix, right, strength, 1e-2, precision=precision)
    eye = torch.eye(size, dtype=torch.float64)
    assert_close_rms(found, torch.linalg.solve(matrix + strength * eye, right), 1e-7)
    assert how.steps == ()
    assert how.precision == precision
    assert how.backward_error <= 1e-10
    assert how.ridge_used == 1e-2


def test_columns_of_very_different_size_need_no_ridge():
    """Jacobi scaling: a condition that is only units is no condition."""
    size = torch.logspace(-6, 6, 40, dtype=torch.float64)
    matrix = covariance(40, 10) * size[:, None] * size
    right = torch.randn(40, 3, dtype=torch.float64) * size[:, None]
    found, how = ridge_solve(matrix, right, 0.0, 0.0)
    assert how.steps == ()
    assert how.condition < 1e3
    assert_close_rms(matrix @ found / size[:, None], right / size[:, None], 1e-10)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_raise_is_one_line_and_ten_times_the_last(precision):
    matrix = covariance(20, 1e14)
    _, how = ridge_solve(
        matrix, torch.randn(20, 2, dtype=torch.float64), 0.0, 0.0, precision=precision
    )
    steps = [step for step in how.steps if "raised to" in step]
    assert steps
    assert len(how.steps) == len(steps) + (precision == "float32")
    floor = torch.finfo(torch.float32).eps
    assert how.ridge_used == pytest.approx(floor * 10 ** (len(steps) - 1))
    assert how.strength == pytest.approx(how.ridge_used * float(matrix.diagonal().mean()))
    assert f"raised to {how.ridge_used:.1e}" in steps[-1]


def test_float64_moments_allow_what_float32_moments_do_not():
    matrix, right = covariance(20, 1e9), torch.randn(20, 2, dtype=torch.float64)
    _, exact = ridge_solve(matrix, right, 0.0, 0.0, moments_dtype=torch.float64)
    _, rounded = ridge_solve(matrix, right, 0.0, 0.0, moments_dtype=torch.float32)
    assert exact.steps == ()
    assert "below the rounding" in rounded.steps[0]


def test_an_indefinite_matrix_is_refused_with_the_whole_ladder():
    matrix = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NumericalError, match="no usable factorisation") as caught:
        ridge_solve(matrix, torch.ones(2, 1, dtype=torch.float64), 0.0, 0.0)
    assert str(caught.value).count("raised to") == LADDER_STEPS


def test_nan_is_never_a_solution():
    matrix = covariance(5, 10)
    matrix[2, 1] = matrix[1, 2] = float("nan")
    with pytest.raises(NumericalError):
        ridge_solve(matrix, torch.ones(5, 1, dtype=torch.float64), 0.0, 0.0)


def test_dead_rows_are_counted_and_stay_zero():
    matrix = covariance(9, 10)
    matrix[[2, 5]], matrix[:, [2, 5]] = 0.0, 0.0
    right = torch.randn(9, 4, dtype=torch.float64)
    found, how = ridge_solve(matrix, right, 0.0, 0.0)
    live = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert how.dead == 2
    assert not found[[2, 5]].any()
    assert_close_rms(found[live], torch.linalg.solve(matrix[live][:, live], right[live]), 1e-12)


def test_no_right_hand_side_is_an_empty_solution():
    found, how = ridge_solve(covariance(6, 10), torch.zeros(6, 0, dtype=torch.float64), 0.0, 0.0)
    assert found.shape == (6, 0)
    assert how.steps == ()


def test_the_longest_ladder_fits_the_record():
    step = (
        "ridge 1.2e-07: smallest eigenvalue -1.0e-08 is below the rounding 1.2e-07 of the moments"
    )
    full = Diagnostics(
        1e-4,
        1.1920928955078125e-07,
        1e-300,
        1e300,
        1e-16,
        11008,
        "float64",
        (f"{step}; raised to 1.2e-06",) * LADDER_STEPS,
    )
    assert full.encode().shape == (RECORD_BYTES,)
    assert Diagnostics.decode(full.encode()) == full

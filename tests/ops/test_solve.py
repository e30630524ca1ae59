"""The ladder: what it accepts is accurate, what it raises it says, what it cannot do it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from liar_testing import assert_close_rms, covariance

from liar_ext.errors import NumericalError
from liar_ext.ops import solve
from liar_ext.ops.diagnostics import RECORD_BYTES, Diagnostics
from liar_ext.ops.ladder import LADDER_STEPS

DOUBLE = torch.float64


def solve_one(matrix, right, ridge=0.0, **options):
    """Solution and Diagnostics of a batch of one."""
    found = solve(matrix[None], right[None], ridge, **options)
    return found.solution[0], found.diagnostics[0]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 3, 64, 151])
def test_the_solution_is_the_definition(size, precision):
    matrix, right = covariance(size, 1e3), torch.randn(size, 7, dtype=DOUBLE)
    strength = 1e-2 * float(matrix.diagonal().mean())
    found, how = solve_one(matrix, right, 1e-2, precision=precision)
    eye = torch.eye(size, dtype=DOUBLE)
    assert_close_rms(found, torch.linalg.solve(matrix + strength * eye, right), 1e-7)
    assert how.steps == ()
    assert how.precision == precision
    assert how.backward_error <= 1e-10
    assert how.ridge_used == 1e-2
    assert how.strength == pytest.approx(strength)
    assert 0 < how.pivot <= 1


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_forward_error_is_small_at_every_condition_that_is_solved(condition, precision):
    """Jacobi scaling keeps the condition here: the spectrum is that of a correlation matrix."""
    matrix = covariance(96, condition)
    truth = torch.randn(96, 5, dtype=DOUBLE)
    found, how = solve_one(matrix, matrix @ truth, moments_dtype=DOUBLE, precision=precision)
    error = float((found - truth).norm() / truth.norm())
    assert how.ridge_used == 0.0
    assert error <= 1e-6
    if how.precision == "float64":
        # condition times n roundings
        assert error <= 96 * condition * 2.3e-16
    else:
        assert error <= 1e-7
    assert [step for step in how.steps if "repeated in float64" not in step] == []


def test_beyond_the_reach_of_float64_the_ladder_says_so():
    matrix = covariance(96, 1e13)
    _, how = solve_one(matrix, torch.randn(96, 5, dtype=DOUBLE), moments_dtype=DOUBLE)
    assert "at a condition of 9" in how.steps[0]
    assert how.backward_error * how.condition <= 1e-6
    assert how.ridge_used > 0.0


def test_columns_of_very_different_size_need_no_ridge():
    """Jacobi scaling: a condition that is only units is no condition."""
    size = torch.logspace(-6, 6, 40, dtype=DOUBLE)
    matrix = covariance(40, 10) * size[:, None] * size
    right = torch.randn(40, 3, dtype=DOUBLE) * size[:, None]
    found, how = solve_one(matrix, right)
    assert how.steps == ()
    assert how.condition < 1e3
    assert_close_rms(matrix @ found / size[:, None], right / size[:, None], 1e-10)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_raise_is_one_line_and_ten_times_the_last(precision):
    matrix = covariance(20, 1e14)
    _, how = solve_one(matrix, torch.randn(20, 2, dtype=DOUBLE), precision=precision)
    steps = [step for step in how.steps if "raised to" in step]
    assert steps
    assert len(how.steps) == len(steps) + (precision == "float32")
    floor = torch.finfo(torch.float32).eps
    assert how.ridge_used == pytest.approx(floor * 10 ** (len(steps) - 1))
    assert how.strength == pytest.approx(how.ridge_used * float(matrix.diagonal().mean()))
    assert f"raised to {how.ridge_used:.1e}" in steps[-1]


def test_float64_moments_allow_what_float32_moments_do_not():
    matrix, right = covariance(20, 1e9), torch.randn(20, 2, dtype=DOUBLE)
    _, exact = solve_one(matrix, right, moments_dtype=DOUBLE)
    _, rounded = solve_one(matrix, right, moments_dtype=torch.float32)
    assert exact.steps == ()
    assert "below the rounding" in rounded.steps[0]


def test_an_indefinite_matrix_is_refused_with_the_whole_ladder():
    matrix = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=DOUBLE)
    with pytest.raises(NumericalError, match="no usable factorisation") as caught:
        solve_one(matrix, torch.ones(2, 1, dtype=DOUBLE))
    # from the rounding of float32, 1.2e-7, tenfold up to 0.12: the next would be above 1
    assert str(caught.value).count("raised to") == 7
    assert str(caught.value).endswith("ridge 1.2e-01: not positive definite at pivot 2")


def test_a_ridge_that_leaves_nothing_is_no_solution():
    """The residual of an asymmetric matrix asks for a ridge of 1e9, with which Z is zero."""
    matrix = torch.eye(3, dtype=DOUBLE)
    matrix[0, 2] = 0.5
    with pytest.raises(NumericalError, match="no usable factorisation"):
        solve_one(matrix, torch.ones(3, 1, dtype=DOUBLE))


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_negative_diagonal_is_not_a_dead_column(precision):
    matrix = torch.tensor([[1.0, 0.9], [0.9, -5.0]], dtype=DOUBLE)
    with pytest.raises(NumericalError):
        solve_one(matrix, torch.ones(2, 1, dtype=DOUBLE), precision=precision)


def test_the_error_names_the_system():
    matrix = torch.eye(2, dtype=DOUBLE).repeat(4, 1, 1)
    matrix[2] = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    with pytest.raises(NumericalError, match=r"factorisation of system 2 of 4 \(2²\)"):
        solve(matrix, torch.ones(4, 2, 1, dtype=DOUBLE), 0.0)


def test_the_last_rung_is_tried():
    # positive definite from a ridge of 0.8 on; 1e-1 · 10 is the last one
    matrix = torch.tensor([[1.0, 1.8], [1.8, 1.0]], dtype=DOUBLE)
    _, how = solve_one(matrix, torch.ones(2, 1, dtype=DOUBLE), 1e-1)
    assert how.ridge_used == 1.0


def test_nan_is_never_a_solution():
    matrix = covariance(5, 10)
    matrix[2, 1] = matrix[1, 2] = float("nan")
    with pytest.raises(NumericalError):
        solve_one(matrix, torch.ones(5, 1, dtype=DOUBLE))


def test_dead_rows_are_counted_and_stay_zero():
    matrix = covariance(9, 10)
    matrix[[2, 5]], matrix[:, [2, 5]] = 0.0, 0.0
    right = torch.randn(9, 4, dtype=DOUBLE)
    found, how = solve_one(matrix, right)
    live = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert how.dead == 2
    assert not found[[2, 5]].any()
    assert_close_rms(found[live], torch.linalg.solve(matrix[live][:, live], right[live]), 1e-12)
    assert how.condition == pytest.approx(
        solve_one(matrix[live][:, live], right[live])[1].condition, rel=1
    )


def test_no_right_hand_side_is_an_empty_solution():
    found, how = solve_one(covariance(6, 10), torch.zeros(6, 0, dtype=DOUBLE))
    assert found.shape == (6, 0)
    assert how.steps == ()


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_one_bad_system_of_a_batch_does_not_touch_the_others(precision):
    good, bad = covariance(30, 1e2), covariance(30, 1e14)
    matrix, right = torch.stack([good, bad, 2 * good]), torch.randn(3, 30, 4, dtype=DOUBLE)
    together = solve(matrix, right, 0.0, precision=precision)
    for index in range(3):
        alone, how = solve_one(matrix[index], right[index], precision=precision)
        # a batch is refined together, so a neighbour's step may come on top
        bound = 1e-12 if precision == "float64" else 1e-7
        assert_close_rms(together.solution[index], alone, bound)
        assert together.diagnostics[index].steps == how.steps
    assert [bool(how.steps) for how in together.diagnostics] == [False, True, False]


def test_the_shift_predicts_the_means():
    matrix, right = covariance(12, 10)[None], torch.randn(1, 12, 3, dtype=DOUBLE)
    kept, dropped = torch.randn(1, 12, dtype=DOUBLE), torch.randn(1, 3, dtype=DOUBLE)
    found = solve(matrix, right, 1e-3, mean_kept=kept, mean_dropped=dropped)
    expected = dropped[0] - found.solution[0].T @ kept[0]
    assert_close_rms(found.shift[0], expected, 1e-14)
    assert not solve(matrix, right, 1e-3).shift.any()


def test_the_ridge_is_relative_to_its_unit():
    matrix, right = covariance(8, 10)[None], torch.randn(1, 8, 2, dtype=DOUBLE)
    found = solve(matrix, right, 0.1, unit=[5.0])
    assert found.diagnostics[0].strength == pytest.approx(0.5)
    expected = torch.linalg.solve(matrix[0] + 0.5 * torch.eye(8, dtype=DOUBLE), right[0])
    assert_close_rms(found.solution[0], expected, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": torch.ones(2, 3, 4, dtype=DOUBLE)}, r"matrix must be \(batch, s, s\)"),
        ({"matrix": torch.eye(3, dtype=DOUBLE)}, r"matrix must be \(batch, s, s\) and right"),
        ({"right": torch.ones(2, 4, 1, dtype=DOUBLE)}, r"right must be \(2, 3, r\)"),
        ({"ridge": -0.5}, "ridge must be a finite number, 0 or more; got -0.5"),
        ({"ridge": float("nan")}, "ridge must be a finite number"),
        ({"unit": [1.0, -1.0]}, "unit must be a finite number"),
        ({"unit": [1.0]}, "one number for each of 2 systems; got 1"),
        ({"precision": "fp64"}, "auto, float64 or float32; got 'fp64'"),
        ({"right": torch.ones(2, 3, 1)}, r"must be float64; got torch.float64, torch.float32"),
        ({"mean_kept": torch.ones(2, 3, dtype=DOUBLE)}, "together, or neither"),
        (
            {
                "mean_kept": torch.ones(3, dtype=DOUBLE),
                "mean_dropped": torch.ones(2, 1, dtype=DOUBLE),
            },
            r"mean_kept must be \(2, 3\) on cpu",
        ),
        (
            {
                "matrix": torch.ones(0, 3, 3, dtype=DOUBLE),
                "right": torch.ones(0, 3, 1, dtype=DOUBLE),
            },
            "batch is empty",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    matrix = torch.eye(3, dtype=DOUBLE).expand(2, 3, 3)
    right = torch.ones(2, 3, 1, dtype=DOUBLE)
    with pytest.raises(ValueError, match=message):
        solve(**{"matrix": matrix, "right": right, "ridge": 0.0, **change})


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
        math.pi * 1e-16,
    )
    assert full.encode().shape == (RECORD_BYTES,)
    assert Diagnostics.decode(full.encode()) == full


def test_nothing_reaches_autograd():
    matrix = covariance(9, 10.0)[None].requires_grad_()
    found = solve(matrix, torch.randn(1, 9, 2, dtype=torch.float64), 1e-3)
    assert not found.solution.requires_grad
    assert not found.shift.requires_grad


@pytest.mark.parametrize("ridge", [0.0, 1e-3], ids=["some climb", "none climbs"])
def test_records_are_a_sequence_of_what_each_system_alone_has(ridge):
    good, bad = covariance(9, 10.0), covariance(9, 1e12)
    matrix = torch.stack([good, bad, 2 * good])
    right = torch.randn(3, 9, 2, dtype=torch.float64)
    records = solve(matrix, right, ridge).diagnostics
    alone = [
        solve(m[None], r[None], ridge).diagnostics[0] for m, r in zip(matrix, right, strict=True)
    ]
    assert [r.steps for r in records] == [r.steps for r in alone]
    assert bool(records[1].steps) == (ridge == 0.0)
    assert records[-1] == records[2]
    assert records[:2] == tuple(records)[:2]
    assert records == tuple(records)
    assert records == solve(matrix, right, ridge).diagnostics
    assert repr(records) == repr(tuple(records))
    with pytest.raises(IndexError):
        records[3]


def test_products_with_inverted_blocks_are_as_exact_as_a_triangular_solve(monkeypatch):
    """A block with all of the condition in it: without a correction the ridge was raised twice."""
    from liar_ext.ops import factor

    whole = torch.block_diag(covariance(512, 1e8), covariance(512, 10.0), covariance(300, 10.0))
    true = torch.randn(1, len(whole), 6, dtype=torch.float64)
    right = whole[None] @ true
    made = factor.LibraryFactor.of
    monkeypatch.setattr(
        factor.LibraryFactor, "of", classmethod(lambda cls, scaled: made(scaled, products=True))
    )
    found = solve(whole[None], right, 0.0, moments_dtype=torch.float64)
    assert found.diagnostics[0].steps == ()
    assert found.diagnostics[0].backward_error < 2e-16
    assert float((found.solution - true).norm() / true.norm()) < 1e-6

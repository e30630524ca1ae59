"""interpolate and repair against their definition, `lstsq` on the raw activations in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from liar_testing import covariance
from torch import Tensor

from liar_ext.errors import InputError, NumericalError
from liar_ext.ops import (
    Moments,
    gram,
    gram_reference,
    interpolate,
    interpolate_reference,
    inverse_moments,
    relative_residual,
    repair,
    residual_reference,
)
from liar_ext.ops.interpolate import cheapest, costs, solve_interpolation

EPS32 = torch.finfo(torch.float32).eps


def activations(columns: int, tokens: int | None = None, seed: int = 0) -> Tensor:
    """Correlated columns with means that are not small."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens or 20 * columns + 50, columns, generator=generator) @ mix
    return x + torch.randn(columns, generator=generator)


def split(columns: int, kept: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return order[:kept].sort().values, order[kept:].sort().values


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


SIZES = [(2, 1), (7, 3), (65, 60), (65, 5), (130, 77)]


@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-1])
@pytest.mark.parametrize(("columns", "kept"), SIZES)
def test_q_and_p_are_least_squares(columns, kept, ridge, center):
    x = activations(columns)
    keep, drop = split(columns, kept)
    q, p = interpolate_reference(x, keep, drop, ridge, center)
    exact = interpolate(gram_reference(x), keep, drop, ridge=ridge, center=center)
    assert error(exact.Q, q) <= 1e-9
    assert error(exact.P, p) <= 1e-9 if center else not exact.P.any()
    single = interpolate(gram(x), keep, drop, ridge=ridge, center=center)
    # G is rounded to float32, and the system passes that on by its condition
    bound = max(1e-5, 4 * single.diagnostics.condition * EPS32)
    assert error(single.Q, q) <= bound
    assert single.diagnostics.steps == ()


@pytest.mark.parametrize("outputs", [3, 200], ids=["few outputs", "many outputs"])
@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("columns", "kept"), SIZES)
def test_repair_folds_the_interpolation_whatever_the_cheaper_side(columns, kept, outputs, center):
    x = activations(columns)
    keep, drop = split(columns, kept)
    weight = torch.randn(outputs, columns)
    q, p = interpolate_reference(x, keep, drop, 1e-3, center)
    dropped = weight[:, drop].double()
    folded = repair(gram_reference(x), weight, keep, drop, ridge=1e-3, center=center)
    assert error(folded.weight, weight[:, keep].double() + dropped @ q.T) <= 1e-9
    assert error(folded.shift, dropped @ p) <= 1e-9 if center else not folded.shift.any()


@pytest.mark.parametrize("outputs", [3, 200], ids=["few outputs", "many outputs"])
@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("columns", "kept"), [(7, 6), (65, 60), (130, 110)])
def test_an_inverse_at_hand_gives_the_same_repair(columns, kept, outputs, center):
    x = activations(columns)
    x[:, [1, 4]] = 0.0  # dead columns may be on either side
    keep, drop = split(columns, kept)
    weight, moments = torch.randn(outputs, columns), gram_reference(x)
    inverse = inverse_moments(moments, ridge=1e-3, center=center)
    assert cheapest(kept, columns - kept, outputs, True).startswith("inverse")
    direct = repair(moments, weight, keep, drop, ridge=1e-3, center=center)
    found = repair(moments, weight, keep, drop, ridge=1e-3, center=center, inverse=inverse)
    assert error(found.weight, direct.weight) <= 1e-10
    assert error(found.shift, direct.shift) <= 1e-10 if center else not found.shift.any()
    assert found.diagnostics.ridge_used == 1e-3
    assert found.diagnostics.steps == ()


@pytest.mark.parametrize("with_inverse", [False, True], ids=["moments", "inverse"])
@pytest.mark.parametrize("rows", [0, 1, 7, 30])
@pytest.mark.parametrize(("kept", "outputs"), [(40, 31), (40, 90), (60, 31), (60, 90)])
def test_slices_of_a_weight_are_repaired_like_the_whole(kept, outputs, rows, with_inverse):
    x, weight = activations(65), torch.randn(outputs, 65)
    keep, drop = split(65, kept)
    moments = gram_reference(x)
    inverse = inverse_moments(moments, ridge=1e-3) if with_inverse else None
    whole = repair(moments, weight, keep, drop, ridge=1e-3, inverse=inverse)
    part = repair(
        moments, weight[1 : rows + 1], keep, drop, ridge=1e-3, inverse=inverse, outputs=outputs
    )
    # the same system, so only roundings of products of another shape
    assert error(part.weight, whole.weight[1 : rows + 1]) <= 1e-12
    assert error(part.shift, whole.shift[1 : rows + 1]) <= 1e-12
    assert part.diagnostics.ridge_used == whole.diagnostics.ridge_used
    assert part.diagnostics.condition == whole.diagnostics.condition
    assert part.weight.shape == (rows, kept)
    assert part.weight.is_contiguous()


def test_a_slice_takes_the_route_of_the_whole(monkeypatch):
    x, weight = activations(65), torch.randn(90, 65)
    keep, drop = split(65, 40)
    asked = []
    monkeypatch.setitem(
        repair.__globals__, "cheapest", lambda *shape: asked.append(shape) or cheapest(*shape)
    )
    repair(gram(x), weight[:3], keep, drop, ridge=1e-3, outputs=90)
    repair(gram(x), weight[:3], keep, drop, ridge=1e-3)
    assert [shape[2] for shape in asked] == [90, 3]


def test_a_ladder_step_solves_the_system_it_was_given():
    """The factor of a failed attempt is made in place of a copy, never of the system itself."""
    x, weight = activations(600, 900), torch.randn(9, 600)
    x[:, 1] = x[:, 0]
    keep, drop = torch.arange(560), torch.arange(560, 600)
    moments = gram(x)
    climbed = repair(moments, weight, keep, drop, ridge=0.0)
    assert climbed.diagnostics.steps
    used = climbed.diagnostics.ridge_used
    direct = repair(moments, weight, keep, drop, ridge=used)
    assert direct.diagnostics.steps == ()
    assert torch.equal(climbed.weight, direct.weight)
    assert climbed.diagnostics.backward_error == direct.diagnostics.backward_error


def test_an_inverse_that_would_not_help_is_not_used():
    x, weight = activations(40), torch.randn(5, 40)
    keep, drop = split(40, 4)
    moments = gram_reference(x)
    inverse = inverse_moments(moments, ridge=1e-3)
    wrong = dataclasses.replace(inverse, theta=inverse.theta * float("nan"))
    found = repair(moments, weight, keep, drop, ridge=1e-3, inverse=wrong)
    assert torch.equal(found.weight, repair(moments, weight, keep, drop, ridge=1e-3).weight)


def test_an_inverse_that_cannot_be_solved_is_reported_and_replaced():
    x, weight = activations(40), torch.randn(50, 40)
    keep, drop = split(40, 36)
    moments = gram_reference(x)
    inverse = inverse_moments(moments, ridge=1e-3)
    singular = dataclasses.replace(inverse, theta=torch.ones(40, 40, dtype=torch.float64))
    found = repair(moments, weight, keep, drop, ridge=1e-3, inverse=singular)
    assert found.diagnostics.steps[0].startswith("inverse: ")
    assert found.diagnostics.steps[0].endswith("solved from the Moments")
    assert torch.equal(found.weight, repair(moments, weight, keep, drop, ridge=1e-3).weight)


def test_moments_without_an_inverse_are_refused():
    x = activations(12, 400)
    x[:, 1] = x[:, 0]
    with pytest.raises(NumericalError, match=r"the Moments with ridge 0\.0e\+00: no "):
        inverse_moments(gram(x), ridge=0.0)


@pytest.mark.parametrize("change", [{"ridge": 1.0}, {"center": False}, {"count": 7}])
def test_an_inverse_of_something_else_is_refused(change):
    x, weight = activations(40), torch.randn(5, 40)
    keep, drop = split(40, 36)
    moments = gram_reference(x)
    inverse = dataclasses.replace(inverse_moments(moments, ridge=1e-3), **change)
    with pytest.raises(ValueError, match="the inverse was made with ridge"):
        repair(moments, weight, keep, drop, ridge=1e-3, inverse=inverse)


def test_an_inverse_is_the_inverse():
    x = activations(33)
    x[:, 5] = 2.0  # dead when centred
    moments = gram_reference(x)
    found = inverse_moments(moments, ridge=1e-2)
    covariance = torch.cov(x.double().T, correction=0)
    assert found.strength == pytest.approx(1e-2 * float(covariance.diagonal().mean()))
    covariance.diagonal().add_(found.strength)
    covariance[5], covariance[:, 5] = 0.0, 0.0
    covariance[5, 5] = 1.0
    assert error(found.theta, torch.linalg.inv(covariance)) <= 1e-10


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_a_solution_within_the_rounding_of_its_moments_is_not_silent(mean):
    """Seen from the variances, float32 sums are rounded at eps · mean square / variance."""
    factor = torch.linalg.cholesky(covariance(64, 1e6))
    x = torch.randn(20000, 64, dtype=torch.float64) @ factor.T
    x = (x - x.mean(0)) / x.std(0) + mean
    moments = Moments.zeros(64)
    for chunk in x.float().split(4096):
        gram(chunk, out=moments)
    keep, drop = split(64, 40)
    found = interpolate(moments, keep, drop, ridge=0.0)
    truth = interpolate(gram_reference(x.float()), keep, drop, ridge=0.0)
    wrong = error(found.Q, truth.Q)
    assert (wrong > 0.1) <= bool(found.diagnostics.steps)
    assert bool(found.diagnostics.steps) == (mean == 30.0)


def test_moments_without_tokens_are_refused():
    with pytest.raises(InputError, match="no tokens"):
        interpolate(Moments.zeros(6), torch.arange(3), torch.arange(3, 6), ridge=1e-4)


def test_a_weight_of_other_columns_is_refused():
    keep, drop = split(12, 7)
    with pytest.raises(ValueError, match=r"weight must be \(out, 12\).*got \(3, 20\)"):
        repair(gram(activations(12)), torch.randn(3, 20), keep, drop, ridge=1e-4)


def test_a_repair_has_no_gradient_and_needs_none():
    keep, drop = split(12, 7)
    weight = torch.nn.Parameter(torch.randn(3, 12))
    found = repair(gram(activations(12)), weight, keep, drop, ridge=1e-4)
    assert not found.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_the_ops(dtype):
    x, weight = activations(90), torch.randn(5, 90)
    keep, drop = split(90, 50)
    expected = repair(gram(x), weight, keep, drop, ridge=1e-4)
    with torch.autocast("cpu", dtype=dtype):
        found = repair(gram(x), weight, keep, drop, ridge=1e-4)
    assert torch.equal(found.weight, expected.weight)
    assert found.diagnostics == expected.diagnostics


@pytest.mark.parametrize(
    ("kept", "dropped", "outputs", "inverse", "way"),
    [
        (5504, 5504, 4096, False, "fold first"),
        (5504, 5504, 11008, False, "direct"),
        (9907, 1101, 4096, False, "direct"),
        (9907, 1101, 4096, True, "inverse, fold first"),
        (9907, 1101, 20000, True, "inverse"),
        (1101, 9907, 4096, True, "fold first"),
    ],
)
def test_the_cheapest_way_is_taken(kept, dropped, outputs, inverse, way):
    assert cheapest(kept, dropped, outputs, inverse) == way
    assert costs(kept, dropped, outputs, inverse)[way] > 0


@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
def test_the_reported_residual_is_the_measured_one_and_the_smallest(center):
    x, weight = activations(90), torch.randn(31, 90)
    keep, drop = split(90, 40)
    moments = gram_reference(x)
    folded = repair(moments, weight, keep, drop, ridge=0.0, center=center)
    shift = folded.shift if center else None
    reported = relative_residual(moments, weight, keep, folded.weight, shift)
    assert reported == pytest.approx(
        residual_reference(x, weight, keep, folded.weight, shift), rel=1e-9
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        nudged = folded.weight + 1e-3 * torch.randn(
            folded.weight.shape, generator=generator, dtype=torch.float64
        )
        assert relative_residual(moments, weight, keep, nudged, shift) > reported
    plain = relative_residual(moments, weight, keep, weight[:, keep].double())
    mean = weight[:, drop].double() @ moments.mean()[drop]
    biased = relative_residual(moments, weight, keep, weight[:, keep].double(), mean)
    assert reported < plain
    assert not center or reported < biased


def test_relative_residual_counts_every_column_block():
    # wider than one block of columns
    x, weight = activations(1100, 1500), torch.randn(5, 1100)
    keep, _ = split(1100, 600)
    new = torch.randn(5, 600)
    moments = gram_reference(x)
    assert relative_residual(moments, weight, keep, new) == pytest.approx(
        residual_reference(x, weight, keep, new), rel=1e-9
    )


def test_a_copy_of_a_kept_column_is_restored_exactly():
    x = activations(20).double()
    x[:, 11] = 2 * x[:, 4] + 3
    keep = torch.tensor([i for i in range(20) if i != 11])
    found = interpolate(gram_reference(x), keep, torch.tensor([11]), ridge=0.0)
    expected = torch.zeros(19, 1, dtype=torch.float64)
    expected[4] = 2.0
    assert float((found.Q - expected).abs().max()) < 1e-9
    assert float(found.P) == pytest.approx(3.0, abs=1e-8)


@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
def test_dead_columns_get_nothing_and_disturb_nothing(center):
    x = activations(30)
    x[:, [3, 7]] = 0.0  # 3 is kept, 7 dropped
    keep = torch.tensor([i for i in range(30) if i not in (7, 9)])
    drop = torch.tensor([7, 9])
    found = interpolate(gram(x), keep, drop, ridge=0.0, center=center)
    assert found.diagnostics.dead == 1
    assert found.diagnostics.steps == ()
    assert not found.Q[3].any(), "a dead kept column predicts nothing"
    assert not found.Q[:, 0].any(), "a dead dropped column needs nothing"
    q, _ = interpolate_reference(x, keep, drop, 0.0, center)
    assert error(found.Q, q) <= 1e-4


# 1.5 squared is exact in float32; of the others rounding leaves a variance above or below zero
@pytest.mark.parametrize("value", [1.5, 0.1, 1.1, -777.7])
def test_a_constant_column_is_dead_for_the_affine_fit_and_its_mean_goes_to_p(value):
    x = activations(10)
    x[:, [2, 5]] = value
    keep = torch.tensor([i for i in range(10) if i != 5])
    found = interpolate(gram(x), keep, torch.tensor([5]), ridge=0.0)
    assert found.diagnostics.dead == 1
    assert float(found.P) == pytest.approx(value, rel=1e-5)
    assert float(found.Q.abs().max()) < 1e-5 * abs(value)


def test_everything_dead_is_no_failure():
    moments = gram(torch.zeros(50, 6))
    found = interpolate(moments, torch.arange(3), torch.arange(3, 6), ridge=1e-4)
    assert not found.Q.any()
    assert not found.P.any()


def test_a_singular_system_climbs_the_ladder_and_says_so():
    x = activations(12, 400)
    x[:, 1] = x[:, 0]
    keep, drop = torch.arange(8), torch.arange(8, 12)
    found = interpolate(gram(x), keep, drop, ridge=0.0)
    assert found.diagnostics.steps
    assert "raised to" in found.diagnostics.steps[0]
    assert found.diagnostics.ridge == 0.0
    assert found.diagnostics.ridge_used > 0.0
    assert torch.isfinite(found.Q).all()
    enough = interpolate(gram(x), keep, drop, ridge=1e-3)
    assert enough.diagnostics.steps == ()
    assert enough.diagnostics.ridge_used == 1e-3


def test_fewer_tokens_than_columns_without_ridge_is_not_silent():
    found = interpolate(
        gram(activations(40, 15)), torch.arange(30), torch.arange(30, 40), ridge=0.0
    )
    assert found.diagnostics.steps
    assert found.diagnostics.ridge_used > 0.0


def test_float32_is_refined_to_the_float64_answer():
    x = activations(80)
    keep, drop = split(80, 50)
    moments = gram_reference(x)
    wide = interpolate(moments, keep, drop, ridge=1e-4)
    narrow = interpolate(moments, keep, drop, ridge=1e-4, precision="float32")
    assert narrow.diagnostics.precision == "float32"
    assert wide.diagnostics.precision == "float64"
    assert error(narrow.Q, wide.Q) <= 1e-7


def test_float32_falls_back_to_float64_in_words():
    # two columns that agree to 1e-4: a condition of 1e8 is beyond a float32 factorisation
    x = activations(30, 3000).double()
    x[:, 1] = x[:, 0] + 1e-4 * torch.randn(3000, dtype=torch.float64)
    moments = gram_reference(x)
    keep, drop = torch.arange(20), torch.arange(20, 30)
    found = interpolate(moments, keep, drop, ridge=0.0, precision="float32")
    assert found.diagnostics.precision == "float64"
    assert "repeated in float64" in found.diagnostics.steps[0]
    q, _ = interpolate_reference(x, keep, drop)
    assert error(found.Q, q) <= 1e-4


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
def test_the_condition_estimate_is_within_a_factor(spread):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    x = (
        torch.randn(4000, 40, generator=generator, dtype=torch.float64)
        * torch.logspace(
            0, -0.5 * torch.log10(torch.tensor(spread)).item(), 40, dtype=torch.float64
        )
        @ basis
    )
    keep, drop = torch.arange(39), torch.tensor([39])
    moments = gram_reference(x)
    block = moments.second(keep, keep)
    scale = block.diagonal().rsqrt()
    true = float(torch.linalg.cond(block * scale[:, None] * scale))
    found = interpolate(moments, keep, drop, ridge=0.0, center=False).diagnostics.condition
    assert true / 3 <= found <= 1.01 * true


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value):
    x = activations(8)
    x[3, 2] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        interpolate(gram(x), torch.arange(5), torch.arange(5, 8), ridge=1e-4)


@pytest.mark.parametrize(
    ("keep", "drop"), [([0, 1], [2]), ([0, 1, 1], [2, 3]), ([0, 1, 2], [2, 3]), ([0, 1, 5], [2, 3])]
)
def test_keep_and_drop_must_be_a_partition(keep, drop):
    with pytest.raises(ValueError, match="partition of the 4 columns"):
        interpolate(gram(activations(4)), torch.tensor(keep), torch.tensor(drop), ridge=0.0)


def test_moments_of_the_kept_panel_are_enough_without_ridge():
    x = activations(25)
    keep, drop = split(25, 12)
    panel, whole = gram(x, keep=keep), gram(x)
    assert not panel.complete
    for center in (True, False):
        narrow = interpolate(panel, keep, drop, ridge=0.0, center=center)
        wide = interpolate(whole, keep, drop, ridge=0.0, center=center)
        assert error(narrow.Q, wide.Q) <= 1e-4
    with pytest.raises(ValueError, match="dropped × dropped"):
        panel.second(drop, drop)


def test_merged_moments_give_the_same_interpolation():
    x = activations(30, 900)
    keep, drop = split(30, 20)
    merged = gram_reference(x[:100]) + gram_reference(x[100:])
    whole = interpolate(gram_reference(x), keep, drop, ridge=1e-4)
    assert error(interpolate(merged, keep, drop, ridge=1e-4).Q, whole.Q) <= 1e-12


def test_the_torch_operator_passes_opcheck():
    moments: Moments = gram(activations(12))
    keep, drop = split(12, 7)
    arguments = (
        moments.gram,
        moments.sum,
        moments.count,
        None,
        False,
        keep,
        drop,
        1e-3,
        True,
        "auto",
    )
    torch.library.opcheck(solve_interpolation, arguments)


def test_constant_columns_are_dead_after_many_tokens():
    """Their float32 variance is rounding: up to 30 eps of the mean square at 20000 tokens."""
    x = activations(24, 20000)
    x[:, ::2] = torch.linspace(0.3, 7.7, 12)
    moments = Moments.zeros(24)
    for chunk in x.split(4096):
        gram(chunk, out=moments)
    keep, drop = torch.arange(16), torch.arange(16, 24)
    found = interpolate(moments, keep, drop, ridge=1e-4)
    assert found.diagnostics.dead == 8
    assert found.diagnostics.steps == ()
    assert found.diagnostics.ridge_used == 1e-4


def test_a_ridge_needs_the_variance_of_all_columns():
    x = activations(12)
    keep, drop = split(12, 6)
    with pytest.raises(ValueError, match="whole triangle"):
        interpolate(gram(x, keep=keep), keep, drop, ridge=0.1)


def test_an_output_that_does_not_vary_has_a_finite_residual():
    x = torch.ones(50, 6) * torch.arange(1.0, 7.0)
    keep = torch.tensor([0, 2, 4])
    found = relative_residual(gram(x), torch.randn(3, 6), keep, torch.randn(3, 3))
    assert 1.0 < found < 1e12

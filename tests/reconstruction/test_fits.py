"""mask-tuning, rotation and admm against their definitions on raw activations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.ops import gram_reference, residual_reference
from liar_ext.ops.moments import Moments
from liar_ext.ops.residual import residual_energies
from liar_ext.reconstruction import RECONSTRUCTIONS, Task, admm, mask_tuning
from liar_ext.reconstruction.mask_tuning import scales_reference
from liar_ext.reconstruction.rotation import rotation_reference

FITS = ("mask-tuning", "rotation", "rotation-scaled", "admm", "liar")
CENTER = pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
RIDGE = pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
UNIT = pytest.mark.parametrize("unit", [1, 3])


def problem(seed: int = 0, *, units=13, kept=7, unit=3, outputs=11, tokens=600):
    """Correlated columns with means, the kept units first to last but not together."""
    generator = torch.Generator().manual_seed(seed)
    columns = units * unit
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x = (x + 0.5 * torch.randn(columns, generator=generator)).double()
    weight = torch.randn(outputs, columns, generator=generator)
    chosen = torch.randperm(units, generator=generator)[:kept].sort().values
    keep = (chosen[:, None] * unit + torch.arange(unit)).flatten()
    dropped = torch.ones(columns, dtype=torch.bool)
    dropped[keep] = False
    return x, weight, keep, dropped.nonzero().flatten()


def repaired(name, x, weight, keep, drop, *, ridge=1e-3, center=True, unit=1, moments=None):
    moments = gram_reference(x) if moments is None else moments
    task = Task(moments, weight, keep, drop, ridge, center, unit=unit)
    return RECONSTRUCTIONS[name].repair(task)


def loss(x, weight, keep, drop, new, ridge: float, center: bool) -> float:
    """What all of them minimise: `E‖W'x_S + b' − Wx‖² + λ‖W' − W_S‖²`."""
    moved = x - x.mean(0) if center else x
    strength = ridge * moved.square().mean(0).mean()
    error = moved[:, keep] @ new.double().T - moved @ weight.double().T
    change = new.double() - weight[:, keep].double()
    return float(error.square().sum(1).mean() + strength * change.square().sum())


@UNIT
@CENTER
@RIDGE
def test_mask_tuning_is_the_least_squares_fit_of_one_scale_a_unit(ridge, center, unit):
    x, weight, keep, drop = problem(1, unit=unit)
    expected = scales_reference(x, weight, keep, unit, ridge, center)
    assert float(expected.abs().max()) < mask_tuning.WINDOW
    found = repaired("mask-tuning", x, weight, keep, drop, ridge=ridge, center=center, unit=unit)
    scaled = weight[:, keep].double() * expected.repeat_interleave(unit)
    assert_close_rms(found.weight, scaled, 1e-9)
    assert found.diagnostics.ridge_used == ridge and found.diagnostics.steps == ()


def test_blocks_of_columns_add_up():
    """Wider than the blocks in which the normal matrix is made."""
    x, weight, keep, drop = problem(2, units=700, kept=600, unit=1, outputs=5, tokens=1500)
    expected = scales_reference(x, weight, keep, 1, 1e-2, True)
    found = repaired("mask-tuning", x, weight, keep, drop, ridge=1e-2)
    assert_close_rms(found.weight, weight[:, keep].double() * expected, 1e-8)


def test_scales_outside_the_window_are_refused_and_said_so():
    """A kept column of tiny weight stands in for a dropped twin with a scale of 1000."""
    x, weight, keep, drop = problem(3, unit=1, units=9, kept=6)
    x[:, drop[0]] = x[:, keep[2]]
    weight[:, keep[2]] = 1e-3 * weight[:, drop[0]]
    free = scales_reference(x, weight, keep, 1, 0.0, True)
    assert float(free[2]) > 900
    found = repaired("mask-tuning", x, weight, keep, drop, ridge=0.0)
    assert found.diagnostics.steps == ("1 of 6 scales outside ±10 refused, left at 1",)
    assert torch.equal(found.weight[:, 2], weight[:, keep[2]].double())
    # the others are the optimum beside a scale that is fixed
    others = torch.cat([keep[:2], keep[3:]])
    whole = weight.clone()
    whole[:, keep[2]] = 0.0
    expected = scales_reference(x, whole, others, 1, 0.0, True)
    scaled = weight[:, others].double() * expected
    assert_close_rms(torch.cat([found.weight[:, :2], found.weight[:, 3:]], 1), scaled, 1e-6)


@CENTER
@RIDGE
@pytest.mark.parametrize("outputs", [5, 11, 40], ids=lambda d: f"{d} outputs of 21 kept columns")
@pytest.mark.parametrize("scaled", [False, True], ids=["rotation", "scaled"])
def test_rotation_is_procrustes_on_raw_outputs(scaled, outputs, ridge, center):
    x, weight, keep, drop = problem(4, outputs=outputs)
    name = "rotation-scaled" if scaled else "rotation"
    rotation, scale = rotation_reference(x, weight, keep, ridge, center, scaled=scaled)
    found = repaired(name, x, weight, keep, drop, ridge=ridge, center=center)
    # with fewer columns than outputs, R is free where W_S is not: R W_S is not
    assert_close_rms(found.weight, scale * rotation @ weight[:, keep].double(), 1e-8)
    gram = found.weight.T @ found.weight / scale**2
    kept = weight[:, keep].double()
    assert_close_rms(gram, kept.T @ kept, 1e-10)  # RᵀR = I, seen through W_S
    assert found.diagnostics.backward_error < 1e-12


def test_the_reference_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    x, weight, keep, _ = problem(5)
    rotation, _ = rotation_reference(x, weight, keep, 0.0, True, scaled=False)
    moved = x - x.mean(0)
    pruned, dense = moved[:, keep] @ weight[:, keep].double().T, moved @ weight.double().T
    theirs, _ = linalg.orthogonal_procrustes(pruned.numpy(), dense.numpy())
    assert_close_rms(rotation, torch.from_numpy(theirs).T, 1e-8)


@CENTER
def test_no_rotation_nor_scale_is_better(center):
    x, weight, keep, drop = problem(6)
    best = repaired("rotation-scaled", x, weight, keep, drop, center=center).weight
    plain = repaired("rotation", x, weight, keep, drop, center=center).weight
    least = loss(x, weight, keep, drop, best, 1e-3, center)
    assert least < loss(x, weight, keep, drop, plain, 1e-3, center)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1):
        skew = size * torch.randn(11, 11, generator=generator, dtype=torch.float64)
        turn = torch.linalg.matrix_exp(skew - skew.T)
        assert least < loss(x, weight, keep, drop, turn @ best, 1e-3, center)
        assert least < loss(x, weight, keep, drop, (1 + size) * best, 1e-3, center)
        of_plain = loss(x, weight, keep, drop, plain, 1e-3, center)
        assert of_plain < loss(x, weight, keep, drop, turn @ plain, 1e-3, center)


@CENTER
@UNIT
def test_admm_converges_to_liar(unit, center):
    x, weight, keep, drop = problem(7, unit=unit)
    expected = repaired("liar", x, weight, keep, drop, ridge=1e-2, center=center)
    found = repaired("admm", x, weight, keep, drop, ridge=1e-2, center=center)
    # the distance from the minimum is an estimate
    assert_close_rms(found.weight, expected.weight, 20 * admm.TOLERANCE)
    if center:
        assert_close_rms(found.shift, expected.shift, 100 * admm.TOLERANCE)
    else:
        assert found.shift is None
    assert 3 < found.diagnostics.iterations < admm.ITERATIONS
    assert found.diagnostics.steps == ()


def test_admm_follows_the_papers_iteration():
    """Three variables as they are written, against the one that is kept."""
    x, weight, _, drop = problem(8, unit=1)
    one = torch.eye(x.shape[1], dtype=torch.float64)
    matrix = x.T @ x / len(x) + 0.1 * one
    dense, rho = weight.double(), 0.7
    inverse = torch.linalg.inv(matrix + rho * one)
    z, u = dense.clone(), torch.zeros_like(dense)
    z[:, drop] = 0.0
    for count in range(1, 6):
        w = (dense @ matrix + rho * (z - u)) @ inverse
        z = w + u
        z[:, drop] = 0.0
        u = u + w - z
        found, done, _ = admm.iterate(matrix, dense, drop, rho, tolerance=0.0, iterations=count)
        assert done == count
        assert_close_rms(found, z, 1e-10)


def test_admm_that_does_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(admm, "ITERATIONS", 4)
    x, weight, keep, drop = problem(9)
    found = repaired("admm", x, weight, keep, drop, ridge=1e-4)
    (step,) = found.diagnostics.steps
    assert step.startswith("admm: not converged after 4 iterations")
    assert found.diagnostics.iterations == 4


@CENTER
def test_the_freer_the_fit_the_less_it_leaves(center):
    x, weight, keep, drop = problem(10)
    losses = {
        name: loss(
            x,
            weight,
            keep,
            drop,
            repaired(name, x, weight, keep, drop, center=center).weight,
            1e-3,
            center,
        )
        for name in (*FITS, "none")
    }
    assert losses["liar"] < losses["mask-tuning"] < losses["none"]
    assert losses["liar"] < losses["rotation-scaled"] <= losses["rotation"] < losses["none"]


@pytest.mark.parametrize("name", FITS)
@UNIT
@CENTER
def test_float32_moments_with_dead_columns(center, unit, name):
    """Kept and dropped columns without variance, of value 0 and 2; the residual is that of x."""
    x, weight, keep, drop = problem(11, unit=unit)
    for column, value in ((keep[0], 0.0), (keep[-1], 2.0), (drop[0], 0.0), (drop[-1], 2.0)):
        x[:, column] = value
    x = x.float()
    moments = Moments.zeros(x.shape[1])
    moments.gram += x.T @ x
    moments.sum += x.double().sum(0)
    moments.count += len(x)
    found = repaired(
        name, x, weight, keep, drop, ridge=1e-2, center=center, unit=unit, moments=moments
    )
    exact = repaired(name, x.double(), weight, keep, drop, ridge=1e-2, center=center, unit=unit)
    assert found.weight.isfinite().all()
    assert_close_rms(found.weight, exact.weight, 1e-4)
    assert (found.shift is None) is not center
    error, dense = residual_energies(moments, weight, keep, found.weight, found.shift)
    expected = residual_reference(x, weight, keep, found.weight, found.shift)
    assert error / dense == pytest.approx(expected, rel=1e-3)
    assert found.diagnostics.dead == (2 if center else 1)
    if center:
        mean = (x.double() @ weight.double().T).mean(0)
        small = (x.double()[:, keep] @ found.weight.double().T).mean(0) + found.shift
        assert_close_rms(small, mean, 1e-6)


@pytest.mark.parametrize("name", FITS)
@CENTER
def test_a_sweep_gives_the_changes_of_single_repairs(center, name):
    x, weight, keep, drop = problem(12)
    task = Task(gram_reference(x), weight, keep, drop, 1e-4, center, unit=3)
    fit = RECONSTRUCTIONS[name].sweep(task)
    for ridge in (1.0, 1e-2):
        expected = RECONSTRUCTIONS[name].repair(dataclasses.replace(task, ridge=ridge)).weight
        change = (expected.double() - weight[:, keep].double()).T
        # admm's sweep is the closed form of what it converges to
        assert_close_rms(fit(ridge), change, 1e-4 if name == "admm" else 1e-9)


@pytest.mark.parametrize("name", FITS)
def test_sizes_of_the_plan_are_positive_and_grow(name):
    reconstruction = RECONSTRUCTIONS[name]
    small = reconstruction.holds(64, 64, 32, 32), reconstruction.flops(64, 64, 32)
    large = reconstruction.holds(512, 512, 256, 256), reconstruction.flops(512, 512, 256)
    assert all(0 < a < b for a, b in zip(small, large, strict=True))

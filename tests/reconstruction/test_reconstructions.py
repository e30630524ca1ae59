"""Reconstructions against what they promise, measured on raw activations."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.ops import gram_reference, interpolate_reference, residual_reference
from liar_ext.reconstruction import RECONSTRUCTIONS, Task


def problem(seed: int, columns: int = 37, kept: int = 20, outputs: int = 11):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(600, columns, generator=generator) @ mix
    x = x + torch.randn(columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    order = torch.randperm(columns, generator=generator)
    return x.double(), weight, order[:kept].sort().values, order[kept:].sort().values


def repaired(name: str, x, weight, keep, drop, *, intercept: bool, ridge: float = 0.0, unit=1):
    task = Task(gram_reference(x), weight, keep, drop, ridge, intercept, unit=unit)
    return RECONSTRUCTIONS[name].repair(task)


def test_none_keeps_the_columns_as_they_are():
    x, weight, keep, drop = problem(0)
    found = repaired("none", x, weight, keep, drop, intercept=True)
    assert torch.equal(found.weight, weight[:, keep])
    assert found.shift is None


def test_bias_moves_the_mean_of_what_is_dropped():
    x, weight, keep, drop = problem(1)
    found = repaired("bias", x, weight, keep, drop, intercept=True)
    assert torch.equal(found.weight, weight[:, keep])
    assert_close_rms(found.shift, weight[:, drop].double() @ x[:, drop].mean(0), 1e-12)


@pytest.mark.parametrize("outputs", [3, 50], ids=["few outputs", "many outputs"])
@pytest.mark.parametrize("intercept", [True, False], ids=["affine", "plain"])
def test_liar_is_the_folded_least_squares_fit(intercept, outputs):
    x, weight, keep, drop = problem(2, outputs=outputs)
    found = repaired("liar", x, weight, keep, drop, intercept=intercept, ridge=1e-3)
    q, p = interpolate_reference(x, keep, drop, 1e-3, intercept)
    dropped = weight[:, drop].double()
    assert_close_rms(found.weight, weight[:, keep].double() + dropped @ q.T, 1e-9)
    if intercept:
        assert_close_rms(found.shift, dropped @ p, 1e-9)
    else:
        assert found.shift is None, "a consumer without a bias must not get one"


@pytest.mark.parametrize("name", ["bias", "liar"])
def test_with_an_intercept_the_mean_output_is_the_dense_one(name):
    x, weight, keep, drop = problem(3)
    found = repaired(name, x, weight, keep, drop, intercept=True, ridge=1e-2)
    dense = (x @ weight.double().T).mean(0)
    small = (x[:, keep] @ found.weight.double().T).mean(0) + found.shift
    assert_close_rms(small, dense, 1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_liar_leaves_least_and_the_intercept_helps(seed):
    x, weight, keep, drop = problem(seed)

    def left(name: str, intercept: bool) -> float:
        found = repaired(name, x, weight, keep, drop, intercept=intercept)
        return residual_reference(x, weight, keep, found.weight, found.shift)

    affine, plain = left("liar", True), left("liar", False)
    assert affine < plain < left("none", False)
    assert affine < left("bias", True)


def test_what_each_reconstruction_needs_is_declared():
    """`--bias never` and `check_enough` go by these."""
    assert {name for name, r in RECONSTRUCTIONS.items() if r.needs_bias} == {"bias"}
    assert {name for name, r in RECONSTRUCTIONS.items() if r.solves} == {"liar", "admm"}
    assert {name for name, r in RECONSTRUCTIONS.items() if r.follows} == {"liar"}
    whole = {"mask-tuning", "rotation", "rotation-scaled", "admm"}
    assert {name for name, r in RECONSTRUCTIONS.items() if r.whole} == whole
    ridged = {name for name, r in RECONSTRUCTIONS.items() if r.sweep is not None}
    assert ridged == {"liar", *whole}
    assert all(name == r.name for name, r in RECONSTRUCTIONS.items())

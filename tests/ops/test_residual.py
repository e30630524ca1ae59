"""Residual energies against their definition on raw activations, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liar_ext.ops import Moments, gram, gram_reference, repair, residual_reference
from liar_ext.ops import moments as moments_module
from liar_ext.ops import residual as residual_module
from liar_ext.ops.residual import (
    SINGLE_TOLERANCE,
    relative_residual,
    relative_residual_of,
    residual_energies,
)

RECONSTRUCTIONS = ("none", "bias", "liar", "random")


def activations(columns: int, noise: float = 0.3, tokens: int | None = None) -> Tensor:
    """A few common factors, `noise` of their own for each column, and means."""
    generator = torch.Generator().manual_seed(columns)
    tokens = tokens or 8 * columns + 50
    factors = torch.randn(tokens, max(columns // 8, 1), generator=generator)
    x = factors @ torch.randn(factors.shape[1], columns, generator=generator)
    x += noise * torch.randn(tokens, columns, generator=generator)
    return x + torch.randn(columns, generator=generator)


def problem(columns: int, kept: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    return weight, order[:kept].sort().values, order[kept:].sort().values


def rebuilt(
    name: str, moments: Moments, weight: Tensor, keep: Tensor, drop: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and shift of one reconstruction."""
    plain = weight[:, keep]
    if name == "none":
        return plain, None
    if name == "bias":
        return plain, weight[:, drop].double() @ moments.mean()[drop]
    if name == "random":
        return torch.randn_like(plain), torch.randn(weight.shape[0], dtype=torch.float64)
    found = repair(moments, weight, keep, drop, ridge=1e-4)
    return found.weight, found.shift


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of columns and of rows at the sizes of a test."""
    monkeypatch.setattr(moments_module, "BLOCK", 16)
    monkeypatch.setattr(residual_module, "ROW_BLOCK", 7)
    monkeypatch.setattr(residual_module, "TRIAL_ROWS", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", RECONSTRUCTIONS)
@pytest.mark.parametrize(
    ("columns", "kept", "outputs"),
    [(2, 1, 1), (17, 16, 3), (33, 1, 7), (65, 33, 15), (130, 77, 8), (48, 32, 14)],
)
def test_any_reconstruction_has_its_measured_residual(columns, kept, outputs, name):
    x = activations(columns)
    weight, keep, drop = problem(columns, kept, outputs)
    moments = gram_reference(x)
    new, shift = rebuilt(name, moments, weight, keep, drop)
    expected = residual_reference(x, weight, keep, new, shift)
    found = relative_residual(moments, weight, keep, new, shift)
    # n roundings of float64, and what cancels in 1/residual
    assert found == pytest.approx(expected, rel=1e-10 / min(expected, 1.0))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["none", "liar"])
@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize(("columns", "outputs"), [(63, 5), (130, 77)])
def test_float32_products_are_used_only_where_they_are_good_enough(
    columns, outputs, noise, name, monkeypatch
):
    moments = gram(activations(columns, noise))
    weight, keep, drop = problem(columns, columns // 2, outputs)
    arguments = (moments, weight, keep, *rebuilt(name, moments, weight, keep, drop))
    found = residual_energies(*arguments)
    monkeypatch.setattr(residual_module, "SINGLE_TOLERANCE", 0.0)
    exact = residual_energies(*arguments)
    assert found == pytest.approx(exact, rel=SINGLE_TOLERANCE)
    if name == "none":
        assert found != exact, "float32 products are enough where nothing cancels"
    if noise == 1e-3 and name == "liar":
        assert found == exact, "what cancels is done in float64"


@pytest.mark.parametrize("name", ["none", "liar"])
def test_float32_products_are_within_their_bound(name):
    """The bound is a model of rounding: it has to hold where little is left as well."""
    for noise in (1.0, 1e-2, 1e-4):
        moments = gram(activations(200, noise))
        weight, keep, drop = problem(200, 100, 40)
        new, _ = rebuilt(name, moments, weight, keep, drop)
        order = torch.cat([keep, drop])
        part = (moments, weight, new, order, keep.numel())
        single = residual_module._row_energies(*part, torch.float32)
        double = residual_module._row_energies(*part, torch.float64)
        unit = torch.finfo(torch.float32).eps / 2
        for ours, true, size in zip(single[0], double[0], single[2], strict=True):
            bound = unit * float(size.sum() + 200**0.5 * size.norm())
            assert abs(float(ours.sum() - true.sum())) <= bound


@pytest.mark.parametrize("make", [gram, gram_reference], ids=["fp32", "fp64"])
@pytest.mark.parametrize("cuts", [[0, 31], [1, 30, 0], [10, 10, 11]], ids=str)
def test_energies_of_slices_of_the_outputs_add_up(cuts, make):
    x = activations(65)
    x[:, 5] = 3.0
    weight, keep, drop = problem(65, 40, 31)
    weight[4] = 0.0
    weight[4, 5] = 2.0  # an output that does not vary: its rounding stands in
    moments = make(x)
    new, shift = rebuilt("liar", moments, weight, keep, drop)
    whole = residual_energies(moments, weight, keep, new, shift)
    parts = [
        residual_energies(moments, *rows)
        for rows in zip(
            weight.split(cuts), [keep] * len(cuts), new.split(cuts), shift.split(cuts), strict=True
        )
    ]
    total = tuple(sum(part[i] for part in parts) for i in (0, 1))
    bound = SINGLE_TOLERANCE if make is gram else 1e-12
    assert total == pytest.approx(whole, rel=bound)
    assert relative_residual_of(total) == pytest.approx(relative_residual_of(whole), rel=bound)


def test_no_outputs_have_no_energy():
    weight, keep, _ = problem(9, 5, 0)
    energies = residual_energies(gram(activations(9)), weight, keep, weight[:, keep])
    assert energies == (0.0, 0.0)
    assert relative_residual_of(energies) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [gram, gram_reference], ids=["fp32", "fp64"])
def test_arguments_of_any_dtype_are_left_as_they_are(make, dtype):
    x = activations(40)
    weight, keep, _ = problem(40, 23, 6)
    weight = weight.to(dtype)
    new = (weight[:, keep].double() * 1.25).to(dtype)
    shift = torch.ones(6, dtype=dtype)
    moments = make(x)
    before = [v.clone() for v in (weight, new, shift, moments.gram.tril(), moments.sum)]
    found = relative_residual(moments, weight, keep, new, shift)
    after = (weight, new, shift, moments.gram.tril(), moments.sum)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    expected = residual_reference(x, weight, keep, new, shift)
    # float32 sums of 370 tokens: sqrt(370) roundings of each entry of G
    assert found == pytest.approx(expected, rel=1e-10 if make is gram_reference else 2e-5)


def test_moments_in_another_order_give_the_same_energies():
    x = activations(30)
    weight, keep, _ = problem(30, 12, 4)
    mixed = gram_reference(x, keep=torch.randperm(30))
    found = residual_energies(mixed, weight, keep, weight[:, keep])
    expected = residual_energies(gram_reference(x), weight, keep, weight[:, keep])
    assert found == pytest.approx(expected, rel=1e-12)


def test_autocast_does_not_reach_the_residual():
    weight, keep, _ = problem(90, 50, 5)
    arguments = (gram(activations(90)), weight, keep, weight[:, keep])
    expected = residual_energies(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert residual_energies(*arguments) == expected


def test_moments_of_the_kept_panel_have_no_residual():
    weight, keep, _ = problem(20, 8, 3)
    with pytest.raises(ValueError, match="whole triangle"):
        residual_energies(gram(activations(20), keep=keep), weight, keep, weight[:, keep])


@pytest.mark.parametrize(("rows", "columns", "kept"), [(3, 19, 8), (3, 20, 7), (4, 20, 8)])
def test_shapes_that_do_not_fit_are_named(rows, columns, kept):
    _, keep, _ = problem(20, 8, 3)
    weight, new = torch.ones(rows, columns), torch.ones(3, kept)
    with pytest.raises(ValueError, match=r"weight must be \(out, 20\) and new_weight \(out, 8\)"):
        residual_energies(gram(activations(20)), weight, keep, new)

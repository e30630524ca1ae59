"""The basis that layers share, and what predicts their coefficients in it."""

from __future__ import annotations

import pytest
import torch

from liar_ext import InputError
from liar_ext.depth.grow.basis import basis_reference, gram_of, shared_basis
from liar_ext.depth.grow.mlp import HYPER_PARAMETERS, MlpOptions, fit_mlp, lesa_loss
from liar_ext.depth.grow.ridge import RIDGES, fit_ridge, ridge_reference

CPU = torch.device("cpu")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrices(rows, columns, layers=5):
    return [drawn(rows, columns, seed=layer) for layer in range(layers)]


def of(found, dtype=torch.float64):
    return shared_basis(lambda i: found[i], range(len(found)), device=CPU, dtype=dtype)


@pytest.mark.parametrize(("rows", "columns"), [(17, 17), (13, 40), (31, 7), (1, 9)])
def test_the_basis_is_that_of_the_svd_of_all_layers(rows, columns):
    found = matrices(rows, columns)
    basis, coefficients = of(found)
    expected, blocks = basis_reference(found)
    assert basis.rank == expected.rank == min(rows, 5 * columns)
    torch.testing.assert_close(basis.scale, expected.scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(basis.left, expected.left, rtol=0, atol=1e-10)
    torch.testing.assert_close(coefficients, blocks, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        gram_of(found, CPU), torch.cat(found, 1) @ torch.cat(found, 1).T, rtol=1e-13, atol=1e-12
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: matrices(16, 24),
        # singular values from 1 to 1e-7
        lambda: [torch.diag(torch.logspace(0, -7, 16).double()) @ m for m in matrices(16, 24)],
        # more rows than all layers have columns, and rows that are others'
        lambda: matrices(64, 6),
        lambda: [torch.cat((m, m[:5], m[:1] - m[1:2])) for m in matrices(10, 24)],
    ],
    ids=["full", "ill-conditioned", "tall", "rows twice"],
)
def test_coefficients_give_their_layer_back(make, stored):
    found = [matrix.to(stored) for matrix in make()]
    basis, coefficients = of(found, torch.float32)
    largest = float(basis.scale[0])
    for matrix, own in zip(found, coefficients, strict=True):
        error = torch.linalg.matrix_norm(basis.matrix(own) - matrix.double(), 2)
        assert error / largest < 1e-5
    # a row of V over all layers has length 1, also where its singular value is tiny
    lengths = coefficients.double().square().sum((0, 2)).sqrt()
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


def test_rounding_is_no_direction():
    assert of([torch.cat((m, m[:5])) for m in matrices(10, 24)])[0].rank == 10
    assert of(matrices(64, 6))[0].rank == 30
    basis, coefficients = of([torch.zeros(4, 3).double()] * 3)
    assert basis.rank == 0
    assert torch.equal(basis.matrix(coefficients[0]), torch.zeros(4, 3).double())


def test_small_singular_values_are_accurate():
    """The root of an eigenvalue of G would be wrong by several per cent here."""
    sizes = torch.logspace(0, -7, 12).double()
    left = torch.linalg.qr(drawn(12, 12, seed=9))[0]
    right = torch.linalg.qr(drawn(60, 12, seed=8))[0]
    found = list((left * sizes @ right.T).split(20, 1))
    torch.testing.assert_close(of(found)[0].scale, sizes, rtol=1e-3, atol=0)


@pytest.mark.parametrize("ridge", [RIDGES[0], RIDGES[3]])
def test_ridge_is_the_least_squares_of_its_definition(monkeypatch, ridge):
    monkeypatch.setattr("liar_ext.depth.grow.ridge.RIDGES", (ridge,))
    coefficients = drawn(6, 20, 7)
    centres = [1, 2, 3, 4]
    given = torch.cat([torch.cat((coefficients[i - 1], coefficients[i + 1]), 1) for i in centres])
    wanted = torch.cat([coefficients[i] for i in centres])
    fitted = fit_ridge(coefficients, centres)
    expected = ridge_reference(given, wanted, ridge)
    torch.testing.assert_close(fitted.weights, expected, rtol=1e-9, atol=1e-12)
    one, other = drawn(3, 7, seed=5), drawn(3, 7, seed=6)
    torch.testing.assert_close(fitted(one, other), torch.cat((one, other), 1) @ expected)


@pytest.mark.parametrize("layers", [3, 4, 9])
def test_ridge_finds_what_neighbours_say_and_shrinks_what_they_do_not(layers):
    # each layer is a rotation further than the one below: V_i = (V_{i-1} + V_{i+1}) / (2 cos 1)
    turns = torch.arange(layers).double()[:, None, None]
    known = drawn(40, 6) * turns.cos() + drawn(40, 6, seed=1) * turns.sin()
    centres = list(range(1, layers - 1))
    fitted = fit_ridge(known, centres)
    assert fitted.facts["ridge"] == RIDGES[0]
    assert fitted.facts["held_out_error"][f"{RIDGES[0]:g}"] < 0.01
    fitted = fit_ridge(drawn(layers, 40, 6), centres)
    assert fitted.facts["ridge"] == RIDGES[-1]
    assert all(error > 0.99 for error in fitted.facts["held_out_error"].values())


def test_ridge_of_a_single_row_predicts_something_finite():
    fitted = fit_ridge(drawn(3, 1, 4), [1])
    assert torch.isfinite(fitted(drawn(1, 4), drawn(1, 4))).all()


def test_the_loss_of_lesa():
    predicted = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    wanted = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    # mean of 9, 0, 0, 4; norms 5 and 2
    assert lesa_loss(predicted, wanted, 0.25) == pytest.approx(0.75 * 13 / 4 + 0.25 * 9)
    assert (HYPER_PARAMETERS["paper"].epochs, HYPER_PARAMETERS["code"].epochs) == (5, 10)
    with pytest.raises(InputError, match="--epochs 0: must be at least 1"):
        MlpOptions(0, 1e-4)


def test_the_network_learns_what_neighbours_say():
    turns = torch.arange(6).float()[:, None, None]
    known = drawn(80, 6).float() * turns.cos() + drawn(80, 6, seed=1).float() * turns.sin()
    centres = [1, 2, 3, 4]
    untrained = fit_mlp(known, centres, MlpOptions(1, 0.0), seed=0)
    fitted = fit_mlp(known, centres, MlpOptions(40, 0.0), seed=0)
    assert fitted.facts["steps"] == 40 * 5
    assert untrained.facts["relative_error"] > 0.5 > 0.1 > fitted.facts["relative_error"]
    error = (fitted(known[1], known[3]) - known[2]).square().sum() / known[2].square().sum()
    assert error < 0.1


def test_the_norm_term_restores_the_norm_of_what_cannot_be_predicted():
    noise = drawn(5, 64, 8).float()
    norms = []
    for weight in (0.0, 0.5):
        fitted = fit_mlp(noise, [1, 2, 3], MlpOptions(4, weight), seed=0)
        norms.append(float(fitted(noise[1], noise[2]).norm() / noise[1].norm()))
    assert norms[0] < 0.5 < 0.7 < norms[1]


def test_the_network_is_seeded_and_leaves_the_generator_alone():
    noise = drawn(4, 16, 5).float()

    def predicted(seed):
        return fit_mlp(noise, [1, 2], MlpOptions(2, 1e-4), seed)(noise[0], noise[1])

    before = torch.random.get_rng_state()
    first = predicted(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(predicted(3), first)
    assert not torch.equal(predicted(4), first)

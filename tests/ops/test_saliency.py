"""Gate gradients and Taylor sums against autograd and against the formulas, written out."""

from __future__ import annotations

import pytest
import torch

from liar_ext.ops.saliency import TAYLOR_FORMS, WeightGradients, gate_gradients, taylor_sums


def linear_and_data(dtype=torch.float64):
    """y = W x on 3 examples of 5 tokens, with any loss: `coefficients · sin(y)`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 12, generator=generator, dtype=dtype)
    weight = torch.randn(7, 12, generator=generator, dtype=dtype)
    coefficients = torch.randn(3, 5, 7, generator=generator, dtype=dtype)
    return x, weight, coefficients


def loss_of(x, weight, coefficients):
    return (coefficients * torch.sin(x @ weight.T)).sum()


def test_gate_gradients_are_those_of_explicit_gates():
    x, weight, coefficients = linear_and_data()
    for example in range(3):
        gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
        gated = x[example] * gate.repeat_interleave(3)
        (expected,) = torch.autograd.grad(loss_of(gated, weight, coefficients[example]), gate)
        given = x[example : example + 1].requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(given, weight, coefficients[example]), given)
        found = gate_gradients(given.detach(), gradient, 3)
        assert torch.allclose(found[0], expected, rtol=1e-12)


def test_padding_is_left_out_whatever_it_holds():
    x, gradient, _ = torch.randn(3, 3, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    held = x.masked_fill(~mask[..., None], float("nan"))
    found = gate_gradients(held, gradient, 4, mask)
    expected = (x * gradient * mask[..., None]).double().sum(1).reshape(3, 3, 4).sum(2)
    # products are float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_weight_gradients_are_those_of_single_examples(padded):
    x, weight, coefficients = linear_and_data()
    mask = torch.ones(3, 5, dtype=torch.bool)
    if padded:
        mask[1, 3:] = False
    scale = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    sums = WeightGradients(weight, torch.float64)
    delta = coefficients * torch.cos(x @ weight.T)
    sums.add(x, delta, scale, mask if padded else None)
    total, squares = torch.zeros(7, 12).double(), torch.zeros(7, 12).double()
    for example in range(3):
        asked = weight.clone().requires_grad_()
        rows = mask[example]
        loss = scale[example] * loss_of(x[example, rows], asked, coefficients[example, rows])
        (gradient,) = torch.autograd.grad(loss, asked)
        total += gradient
        squares += gradient**2
    assert torch.allclose(sums.total, total, rtol=1e-12)
    assert torch.allclose(sums.squares, squares, rtol=1e-12)


def test_taylor_sums_are_the_formulas_on_either_side_of_a_chunk():
    generator = torch.Generator().manual_seed(1)
    weight, gradient = torch.randn(2, 515, 9, generator=generator, dtype=torch.float64)
    fisher = torch.rand(515, 9, generator=generator, dtype=torch.float64)
    found = taylor_sums(weight, gradient, fisher)
    assert tuple(found) == TAYLOR_FORMS
    for row in (0, 511, 512, 514):
        w, g, f = weight[row], gradient[row], fisher[row]
        expected = {
            "vector": abs(sum(w[j] * g[j] for j in range(9))),
            "first": sum(abs(w[j] * g[j]) for j in range(9)),
            "second": sum(w[j] ** 2 * f[j] for j in range(9)),
            "mixed": sum(abs(w[j] * g[j] - w[j] ** 2 * f[j] / 2) for j in range(9)),
        }
        for form, value in expected.items():
            assert float(found[form][row]) == pytest.approx(float(value), rel=1e-12)

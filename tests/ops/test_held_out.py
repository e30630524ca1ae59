"""HeldOut: the error on other tokens than those of the fit, from Moments."""

from __future__ import annotations

import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.ops import gram_reference, interpolate_reference, residual_reference
from liar_ext.ops.held_out import HeldOut
from liar_ext.ops.moments import Moments

CENTER = pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])


def problem(columns=37, kept=20, outputs=11, held=150):
    """Tokens of which the held-out ones have other means."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = (torch.randn(600, columns, generator=generator) @ mix).double()
    x += torch.randn(columns, generator=generator)
    x[:held] += 0.3 * torch.randn(columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    order = torch.randperm(columns, generator=generator)
    return x[held:], x[:held], weight, order[:kept].sort().values, order[kept:].sort().values


def fit(x, weight, keep, drop, ridge, center):
    """Change (|S|, out) and shift of the least-squares repair, by lstsq."""
    q, p = interpolate_reference(x, keep, drop, ridge, center)
    dropped = weight[:, drop].double()
    return q @ dropped.T, dropped @ p if center else None


@CENTER
@pytest.mark.parametrize("shape", [(37, 20, 11), (1100, 600, 5)], ids=["small", "several blocks"])
def test_it_is_the_residual_on_raw_held_out_activations(center, shape):
    rest, held, weight, keep, drop = problem(*shape)
    judge = HeldOut(gram_reference(rest), gram_reference(held), weight, keep, drop, center)
    for ridge in (1e-2, 1.0):
        change, shift = fit(rest, weight, keep, drop, ridge, center)
        new = weight[:, keep].double() + change.T
        expected = residual_reference(held, weight, keep, new, shift)
        assert judge.error(change) / judge.dense == pytest.approx(expected, rel=1e-8)


@CENTER
def test_errors_of_slices_of_rows_add_up(center):
    rest, held, weight, keep, drop = problem()
    moments = gram_reference(rest), gram_reference(held)
    change, _ = fit(rest, weight, keep, drop, 1e-2, center)
    whole = HeldOut(*moments, weight, keep, drop, center)
    parts = [
        (HeldOut(*moments, weight[rows], keep, drop, center), change[:, rows])
        for rows in (slice(0, 4), slice(4, 4), slice(4, 11))
    ]
    assert sum(j.error(c) for j, c in parts) == pytest.approx(whole.error(change), rel=1e-12)
    assert sum(j.dense for j, _ in parts) == pytest.approx(whole.dense, rel=1e-12)


@pytest.mark.parametrize("empty", ["fitted", "held"])
def test_without_tokens_on_either_side_it_is_refused(empty):
    rest, held, weight, keep, drop = problem()
    found = {"fitted": gram_reference(rest), "held": gram_reference(held)}
    found[empty] = Moments.zeros(rest.shape[1], dtype=torch.float64)
    with pytest.raises(InputError, match="--ridge auto: .* tokens are held out"):
        HeldOut(found["fitted"], found["held"], weight, keep, drop, True)

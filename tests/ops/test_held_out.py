"""HeldOut: the error on other tokens than those of the fit, from Moments."""

from __future__ import annotations

import pytest
import torch

from liar_ext.errors import InputError
from liar_ext.ops import (
    ColumnMoments,
    Drift,
    cross_reference,
    drift_reference,
    drift_residual_reference,
    gram_reference,
    interpolate_reference,
    residual_reference,
)
from liar_ext.ops.drift import Sample
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


def sample(x, dense=None, weight=None):
    """Statistics in float64, of two paths where there are two."""
    if dense is None:
        return Sample(gram_reference(x))
    z, y = (dense - x) @ weight.double().T, dense @ weight.double().T
    columns = (ColumnMoments(torch.tensor(len(v)), v.sum(0), v.square().sum(0)) for v in (z, y))
    return Sample(gram_reference(x), Drift(cross_reference(z, x), *columns))


def drifted(x, seed):
    """Inputs of a dense path of which `x` are the pruned one's."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return 0.8 * x + 0.3 * noise + torch.randn(x.shape[1], generator=generator)


def fit(x, weight, keep, drop, ridge, center):
    """Change (|S|, out) and shift of the least-squares repair, by lstsq."""
    q, p = interpolate_reference(x, keep, drop, ridge, center)
    dropped = weight[:, drop].double()
    return q @ dropped.T, dropped @ p if center else None


@CENTER
@pytest.mark.parametrize("shape", [(37, 20, 11), (1100, 600, 5)], ids=["small", "several blocks"])
def test_it_is_the_residual_on_raw_held_out_activations(center, shape):
    rest, held, weight, keep, drop = problem(*shape)
    judge = HeldOut(sample(rest), sample(held), weight, keep, drop, center)
    for ridge in (1e-2, 1.0):
        change, shift = fit(rest, weight, keep, drop, ridge, center)
        new = weight[:, keep].double() + change.T
        expected = residual_reference(held, weight, keep, new, shift)
        assert judge.error(change) / judge.dense == pytest.approx(expected, rel=1e-8)


@CENTER
@pytest.mark.parametrize("shape", [(37, 20, 11), (37, 37, 11), (1100, 600, 5)])
def test_with_two_paths_it_is_the_residual_against_the_dense_output(center, shape):
    """Also where nothing is dropped, and with another mean of the drift on held-out tokens."""
    rest, held, weight, keep, drop = problem(*shape)
    dense_rest, dense_held = drifted(rest, 1), drifted(held, 2)
    fitted, other = sample(rest, dense_rest, weight), sample(held, dense_held, weight)
    judge = HeldOut(fitted, other, weight, keep, drop, center)
    for ridge in (1e-2, 1.0):
        new, shift = drift_reference(dense_rest, rest, weight, keep, ridge, center)
        change = (new - weight[:, keep].double()).T
        given = shift if center else None
        expected = drift_residual_reference(dense_held, held, weight, keep, new, given)
        assert judge.error(change) / judge.dense == pytest.approx(expected, rel=1e-8)


def test_a_sample_less_a_part_of_it_is_the_rest():
    rest, held, weight, _, _ = problem()
    dense_rest, dense_held = drifted(rest, 1), drifted(held, 2)
    part = sample(held, dense_held, weight)
    whole = sample(torch.cat([rest, held]), torch.cat([dense_rest, dense_held]), weight)
    found, expected = (whole - part).drift, sample(rest, dense_rest, weight).drift
    assert int(found.pairs.count) == len(rest)
    assert torch.allclose(found.pairs.cross, expected.pairs.cross)
    assert torch.allclose(found.pairs.sum_y, expected.pairs.sum_y)
    assert torch.allclose(found.mean(), expected.mean())
    assert torch.allclose(found.change.variance(), expected.change.variance())
    assert torch.allclose(found.dense.variance(), expected.dense.variance())


@CENTER
def test_errors_of_slices_of_rows_add_up(center):
    rest, held, weight, keep, drop = problem()
    moments = sample(rest), sample(held)
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
    found = {"fitted": sample(rest), "held": sample(held)}
    found[empty] = Sample(Moments.zeros(rest.shape[1], dtype=torch.float64))
    with pytest.raises(InputError, match="--ridge auto: .* tokens are held out"):
        HeldOut(found["fitted"], found["held"], weight, keep, drop, True)

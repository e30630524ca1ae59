"""Drift-aware repair against least squares on the raw inputs of both paths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext import InputError
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.statistics import SitePairs
from liar_ext.ops import (
    ColumnMoments,
    Drift,
    cross_reference,
    drift_reference,
    drift_residual_reference,
    gram_reference,
    repair,
)
from liar_ext.ops.residual import relative_residual_of, residual_energies

TOKENS, COLUMNS, KEPT = 611, 37, 20


def problem(seed: int = 0, outputs: int = 11, size: float = 0.4):
    """Dense and pruned inputs, a consumer, kept and dropped columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mix = normal(COLUMNS, COLUMNS) / COLUMNS**0.5
    dense = normal(TOKENS, COLUMNS) @ mix + normal(COLUMNS)
    # gain, noise and a mean of its own
    x = dense * (1 + size * normal(COLUMNS)) + size * (normal(TOKENS, COLUMNS) + normal(COLUMNS))
    order = torch.randperm(COLUMNS, generator=generator)
    keep, drop = order[:KEPT].sort().values, order[KEPT:].sort().values
    return dense, x, normal(outputs, COLUMNS).float(), keep, drop


def columns_of(y: torch.Tensor) -> ColumnMoments:
    return ColumnMoments(torch.tensor(len(y)), y.sum(0), y.square().sum(0))


def drift_of(dense: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Drift:
    """In float64 from raw inputs."""
    z = (dense - x) @ weight.double().T
    return Drift(cross_reference(z, x), columns_of(z), columns_of(dense @ weight.double().T))


@pytest.mark.parametrize("outputs", [1, 11, 50])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
def test_the_repair_is_the_least_squares_fit_to_the_dense_path(center, ridge, outputs):
    dense, x, weight, keep, drop = problem(outputs=outputs)
    expected, shift = drift_reference(dense, x, weight, keep, ridge, center)
    found = repair(
        gram_reference(x),
        weight,
        keep,
        drop,
        ridge=ridge,
        center=center,
        drift=drift_of(dense, x, weight),
    )
    # float64 throughout, at conditions below 1e4
    assert_close_rms(found.weight, expected, 1e-9)
    assert_close_rms(found.shift, shift, 1e-9)
    assert found.diagnostics.ridge_used == ridge


@pytest.mark.parametrize("outputs", [3, 50], ids=["few outputs", "many outputs"])
@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
def test_without_drift_it_is_the_local_repair_with_the_same_ridge(center, outputs):
    _, x, weight, keep, drop = problem(outputs=outputs)
    moments, options = gram_reference(x), {"ridge": 1e-2, "center": center}
    local = repair(moments, weight, keep, drop, **options)
    found = repair(moments, weight, keep, drop, drift=drift_of(x, x, weight), **options)
    assert found.diagnostics.strength == local.diagnostics.strength
    # it may have solved for Q instead: other roundings, and the condition's share of them
    assert_close_rms(found.weight, local.weight, 1e-11)
    assert_close_rms(found.shift, local.shift, 1e-11)


def test_a_large_ridge_leaves_the_consumer_as_it_was():
    dense, x, weight, keep, drop = problem()
    drift = drift_of(dense, x, weight)
    found = repair(gram_reference(x), weight, keep, drop, ridge=1e9, drift=drift)
    assert_close_rms(found.weight, weight[:, keep], 1e-6)


@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
def test_what_is_kept_whole_is_repaired_too(center):
    dense, x, weight, _, _ = problem()
    keep, drop = torch.arange(COLUMNS), torch.arange(0)
    drift = drift_of(dense, x, weight)
    found = repair(gram_reference(x), weight, keep, drop, ridge=1e-4, center=center, drift=drift)
    expected, shift = drift_reference(dense, x, weight, keep, 1e-4, center)
    assert_close_rms(found.weight, expected, 1e-8)
    assert_close_rms(found.shift, shift, 1e-8)


def test_a_column_without_variance_changes_nothing():
    dense, x, weight, keep, drop = problem()
    x[:, keep[3]] = 0.0
    drift = drift_of(dense, x, weight)
    found = repair(gram_reference(x), weight, keep, drop, ridge=1e-3, drift=drift)
    expected, _ = drift_reference(dense, x, weight, keep, 1e-3)
    assert found.diagnostics.dead == 1
    assert torch.equal(found.weight[:, 3], weight[:, keep[3]].double())
    assert_close_rms(found.weight, expected, 1e-9)


@pytest.mark.parametrize("size", [0.0, 0.01, 0.4])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_residual_is_that_of_the_dense_output(shifted, size):
    dense, x, weight, keep, drop = problem(size=size)
    moments, drift = gram_reference(x), drift_of(dense, x, weight)
    found = repair(moments, weight, keep, drop, ridge=1e-3, center=shifted, drift=drift)
    shift = found.shift if shifted else None
    for new in (found.weight, weight[:, keep].double()):
        expected = drift_residual_reference(dense, x, weight, keep, new, shift)
        energies = residual_energies(moments, weight, keep, new, shift, drift)
        # beside a plain mean square of 4 deviations, in float64
        assert relative_residual_of(energies) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_rows_of_a_slice_are_those_of_the_whole():
    dense, x, weight, keep, drop = problem()
    moments, drift = gram_reference(x), drift_of(dense, x, weight)
    whole = repair(moments, weight, keep, drop, ridge=1e-3, drift=drift)
    energies = torch.tensor(
        residual_energies(moments, weight, keep, whole.weight, whole.shift, drift)
    )
    parts, added = [], torch.zeros(2)
    for rows in (slice(0, 4), slice(4, 11)):
        own = drift.rows(rows)
        part = repair(moments, weight[rows], keep, drop, ridge=1e-3, drift=own)
        parts.append(part)
        added += torch.tensor(
            residual_energies(moments, weight[rows], keep, part.weight, part.shift, own)
        )
    assert_close_rms(torch.cat([p.weight for p in parts]), whole.weight, 1e-12)
    assert_close_rms(torch.cat([p.shift for p in parts]), whole.shift, 1e-12)
    assert_close_rms(added, energies, 1e-6)


def test_the_fit_leaves_less_than_the_local_one():
    dense, x, weight, keep, drop = problem()
    moments, drift = gram_reference(x), drift_of(dense, x, weight)
    local = repair(moments, weight, keep, drop, ridge=1e-6)
    found = repair(moments, weight, keep, drop, ridge=1e-6, drift=drift)
    left = [
        drift_residual_reference(dense, x, weight, keep, f.weight, f.shift) for f in (found, local)
    ]
    assert left[0] < 0.8 * left[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["one segment", "three segments"])
def test_streamed_pairs_are_the_sums_of_all_rows(alone, dtype, monkeypatch):
    """Batches of odd sizes, padding, more and less than a chunk."""
    monkeypatch.setattr("liar_ext.engine.statistics.CHUNK_TOKENS", 200)
    generator = torch.Generator().manual_seed(4)
    sizes = (37, 450, 13, 111)
    given = [
        tuple(torch.randn(t, n, generator=generator).to(dtype) for n in (COLUMNS, 11, 11))
        for t in sizes
    ]
    masks = [torch.rand(t, generator=generator) < 0.8 if t % 2 else None for t in sizes]
    found = SitePairs(11, COLUMNS, torch.device("cpu"), dtype=torch.float32, alone=alone)
    rows: list[tuple[torch.Tensor, ...]] = []
    for number, (batch, mask) in enumerate(zip(given, masks, strict=True)):
        x, local, dense = (part.clone() for part in batch)
        valid = slice(None) if mask is None else mask
        rows.append(tuple(part[valid].clone() for part in (x, dense - local, dense)))
        positions = None if mask is None else mask.nonzero().flatten()
        found.add_pair(x, local, dense, positions, 0 if alone else number // 2)
        # the batch leaves memory
        for part in (x, local, dense):
            part.fill_(float("nan"))
    sample = found.finish_pair(Ranks.single())
    moments, drift = sample.moments, sample.drift
    x, z, y = (torch.cat(part) for part in zip(*rows, strict=True))
    # products of at most 500 rows in float32
    assert_close_rms(moments.gram.tril(), gram_reference(x).gram.tril(), 1e-6)
    assert_close_rms(drift.pairs.cross, cross_reference(z, x).cross, 1e-6)
    for own, raw in ((drift.change, z), (drift.dense, y)):
        expected = columns_of(raw.double())
        assert int(own.count) == len(raw) == int(moments.count) == int(drift.pairs.count)
        assert_close_rms(own.sum, expected.sum, 1e-6)
        assert_close_rms(own.squares, expected.squares, 1e-6)


def test_what_does_not_fit_is_named():
    dense, x, weight, keep, drop = problem()
    moments, drift = gram_reference(x), drift_of(dense, x, weight)
    with pytest.raises(ValueError, match=r"weight must be \(11, 37\)"):
        repair(moments, weight[:5], keep, drop, ridge=0.0, drift=drift)
    few = drift_of(dense[:600], x[:600], weight)
    with pytest.raises(ValueError, match="drift is of 600 tokens, the Moments of 611"):
        repair(moments, weight, keep, drop, ridge=0.0, drift=few)
    broken = replace(drift, pairs=replace(drift.pairs, cross=drift.pairs.cross * float("nan")))
    with pytest.raises(InputError, match="the drift holds NaN"):
        repair(moments, weight, keep, drop, ridge=0.0, drift=broken)

"""Refitted convolutions: least squares by the definition, and what it is worth in a network."""

from __future__ import annotations

import pytest
import torch
from liar_images import LABELS, mobilenet, pictures, resnet
from liar_testing import assert_close_rms
from torch.nn import functional

from liar_ext import InputError
from liar_ext.convolution.algebra import Conv, sequence_reference
from liar_ext.convolution.capture import captured
from liar_ext.convolution.chain import chain_of
from liar_ext.convolution.images import Images
from liar_ext.convolution.measure import Dense, quality
from liar_ext.convolution.network import fused, get_weights, located, weights_of
from liar_ext.convolution.repair import patch_sums, refit, refit_reference, solved


def conv(inputs, outputs, kernel, stride=1, *, depthwise=False, same=0):
    weight = torch.randn(outputs, 1 if depthwise else inputs, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    return Conv(weight, bias, stride, 0 if same else kernel // 2, depthwise, same)


def sums_of(start, x, y, limit=10**6):
    return patch_sums(start, x, y, limit, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_equals_least_squares_on_raw_patches(stride, ridge):
    start = conv(3, 4, 3, stride)
    x = torch.randn(6, 3, 9, 7) + 2
    y = torch.randn(6, 4, *sequence_reference([start], x).shape[2:])
    change, shift = solved(sums_of(start, x, y), ridge)
    expected = refit_reference(start, x, y, ridge)
    got = start.weight + change[0].T.reshape(start.weight.shape)
    assert_close_rms(got, expected.weight, 1e-9)
    assert_close_rms(start.bias + shift[0], expected.bias, 1e-9)


def test_depthwise_is_least_squares_of_each_channel():
    start = conv(3, 3, 3, depthwise=True)
    x, y = torch.randn(5, 3, 8, 8) + 1, torch.randn(5, 3, 8, 8)
    change, shift = solved(sums_of(start, x, y), 1e-3)
    for channel in range(3):
        rows = slice(channel, channel + 1)
        alone = Conv(start.weight[rows], start.bias[rows], 1, 1)
        expected = refit_reference(alone, x[:, rows], y[:, rows], 1e-3)
        assert_close_rms(
            alone.weight + change[channel].T.reshape(alone.weight.shape), expected.weight, 1e-9
        )
        assert_close_rms(alone.bias + shift[channel], expected.bias, 1e-9)


@pytest.mark.parametrize("depthwise", [False, True], ids=["full", "depthwise"])
@pytest.mark.parametrize(("stride", "same"), [(1, 0), (2, 0), (2, 3)])
def test_finds_the_convolution_that_made_the_outputs(depthwise, stride, same):
    wanted = conv(4, 4, 3, stride, depthwise=depthwise, same=same)
    start = conv(4, 4, 3, stride, depthwise=depthwise, same=same)
    pairs = []
    for _ in range(8):
        x = torch.randn(4, 4, 10, 10)
        pairs.append((x, sequence_reference([wanted], x)))
    found, facts = refit(start, iter(pairs), images=32, patches=10**6, seed=0)
    assert_close_rms(found.weight, wanted.weight, 1e-5)
    assert facts["error"] < 1e-9 < facts["error_before"]
    assert facts["positions"] == 32 * (100 // stride**2)


def test_reported_errors_are_those_of_the_held_out_batches():
    start = conv(3, 2, 3)
    pairs = [(torch.randn(4, 3, 6, 6), torch.randn(4, 2, 6, 6)) for _ in range(4)]
    found, facts = refit(start, iter(pairs), images=16, patches=10**6, seed=0)
    x, y = pairs[3]
    variance = torch.cat([b for _, b in pairs]).double().transpose(0, 1).flatten(1)
    variance = float(variance.var(1, correction=0).sum())
    before = float((sequence_reference([start], x) - y).square().sum(1).mean())
    assert facts["error_before"] == pytest.approx(before / variance)
    one, two, three = (sums_of(start, *pair) for pair in pairs[:3])
    change, shift = solved(one + two + three, facts["ridge"])
    made = Conv(start.weight + change[0].T.reshape(start.weight.shape), start.bias + shift[0], 1, 1)
    held_out = float((sequence_reference([made], x) - y).square().sum(1).mean())
    assert facts["error"] == pytest.approx(held_out / variance)
    # the result itself is fitted to all batches, the one that chose included
    change, shift = solved(one + two + three + sums_of(start, x, y), facts["ridge"])
    assert_close_rms(found.weight, start.weight + change[0].T.reshape(found.weight.shape), 1e-9)


def test_a_convolution_that_nothing_improves_is_left_as_it_is():
    """Few positions and outputs that are noise around it: every fit is worse on other images."""
    start = conv(6, 2, 5)
    pairs = []
    for _ in range(4):
        x = torch.randn(1, 6, 5, 5)
        pairs.append((x, sequence_reference([start], x) + 0.1 * torch.randn(1, 2, 5, 5)))
    found, facts = refit(start, iter(pairs), images=4, patches=10**6, seed=0)
    assert found is start and facts["ridge"] is None
    assert facts["error"] == facts["error_before"]


def test_positions_are_drawn_where_there_are_more():
    start = conv(2, 2, 3)
    x, y = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    assert sums_of(start, x, y, limit=5).count == 15
    _, facts = refit(start, [(x, y)] * 4, images=12, patches=60, seed=0)
    assert facts["positions"] == 60


def test_constant_channels_are_left_alone():
    start = conv(2, 2, 3)
    x = torch.randn(4, 2, 8, 8)
    x[:, 1] = 0.0
    change, _ = solved(sums_of(start, x, torch.randn(4, 2, 8, 8)), 0.0)
    assert bool((change[0].reshape(2, 9, 2)[1] == 0).all())
    assert bool(change.isfinite().all())


def test_nan_activations_are_refused():
    x, y = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 6)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        refit(conv(2, 2, 3), [(x, y)] * 4, images=8, patches=10**6, seed=0)


def dense_of(model, count=64):
    pixels, labels = pictures(count)
    found = chain_of(model)
    weights = weights_of(model, found)
    folded = fused(model, found, weights, found.dense)
    return Dense(folded, found, weights, Images(pixels, labels).batches(8), 10**6, 0)


@pytest.mark.parametrize(("make", "name"), [(resnet, "resnet"), (mobilenet, "mobilenet")])
def test_a_repaired_network_is_nearer_to_the_dense_one(make, name):
    """On images that nothing was fitted to, and more so with every segment repaired in order."""
    dense = dense_of(make())
    segments = {s.key: s for s in dense.chain.segments(dense.weights.norms(), 5)}
    if name == "resnet":
        plan = [segments[0, 2, 3], segments[2, 4, 5], *dense.chain.dense[4:7], segments[7, 8, 3]]
    else:
        # late: what 50 random convolutions make of an early change has nothing to do with it
        plan = [*dense.chain.dense[:45], segments[45, 48, 1], *dense.chain.dense[48:]]
    changed = [s for s in plan if s not in dense.chain.dense]
    dense.chain.check(plan)
    pixels = pictures(32)[0].flip(3)
    with torch.no_grad():
        expected = dense.model(pixels).logits

    def error(model):
        with torch.no_grad():
            return float((model(pixels).logits - expected).square().mean())

    model = dense.replaced(plan)
    before = error(model)
    for segment in plan[plan.index(changed[0]) :]:
        facts = dense.repair(model, plan, segment)
        if segment in changed:
            assert facts["error"] < 0.5 * facts["error_before"]
    assert error(model) < 0.7 * before


def test_inside_a_block_the_sum_is_aimed_at():
    """The last convolution of a block makes good what the shortcut carries: fitted to the dense sum
    less the present shortcut."""
    dense = dense_of(resnet())
    segments = {s.key: s for s in dense.chain.segments(dense.weights.norms(), 5)}
    # the first block loses its activation, the second one keeps both convolutions
    plan = [segments[0, 2, 3], *dense.chain.dense[2:]]
    model = dense.replaced(plan)
    last = plan[2]
    merged, residual = located(model, dense.chain, plan)[last]
    assert (last.start, last.end) == (3, 4) and residual is not None
    start = get_weights(merged)
    facts = dense.repair(model, plan, last)
    rows = [(x, y) for x, y in dense._pairs(model, plan, last)]
    for (x, y), batch in zip(rows, dense.batches, strict=True):
        block = captured(model, batch.pixels, {"in": (residual, "input"), "x": (merged, "input")})
        stage = dense.model.get_submodule("resnet.encoder.stages.0.layers.1")
        wanted = captured(dense.model, batch.pixels, {"sum": (stage.activation, "input")})["sum"]
        torch.testing.assert_close(y, wanted - block["in"])
        assert torch.equal(x, block["x"])
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    expected = refit_reference(start, x, y, facts["ridge"])
    assert_close_rms(get_weights(merged).weight, expected.weight, 1e-5)


def test_quality_counts_images():
    model = resnet()
    pixels, labels = pictures(10)
    with torch.no_grad():
        logits = model(pixels).logits
    found = quality(model, Images(pixels, labels), 3)
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert logits.shape[1] == LABELS

"""What may be a segment, and that every one of them computes what it says."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from liar_images import mobilenet, pictures, resnet

from liar_ext import InputError
from liar_ext.convolution.algebra import sequence_reference
from liar_ext.convolution.chain import Block, Chain, Node, Segment, Slot, chain_of, node_of
from liar_ext.convolution.measure import input_shapes
from liar_ext.convolution.network import fused, located, shape_of, weights_of
from liar_ext.errors import UnsupportedModelError

NETWORKS = {
    "basic": lambda: resnet(),
    "bottleneck": lambda: resnet(layer_type="bottleneck", hidden_sizes=[8, 16]),
    "bottleneck, stride first": lambda: resnet(
        layer_type="bottleneck", hidden_sizes=[8, 16], downsample_in_bottleneck=True
    ),
    "mobilenet": lambda: mobilenet(),
    "mobilenet, own stem": lambda: mobilenet(first_layer_is_expansion=False),
    "mobilenet, centred": lambda: mobilenet(tf_padding=False),
}


def node(inputs, outputs, kernel=3, stride=1, *, activation="relu", **fields):
    values = {"padding": kernel // 2, "same": 0, "depthwise": False, **fields}
    return Node("x", inputs, outputs, kernel, stride, activation=activation, **values)


def chain(*nodes, blocks=()):
    return Chain(nodes, tuple(blocks), (Slot("x", len(nodes)),))


def spans(found):
    return {(s.start, s.end) for s in found}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [32, 33])
def test_folding_batch_norms_changes_nothing(name, side):
    model = NETWORKS[name]()
    found = chain_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fused(model, found, weights_of(model, found), found.dense)
    pixels = pictures(4, side=side)[0]
    with torch.no_grad():
        expected, got = model(pixels).logits, folded(pixels).logits
    assert float(expected.std()) > 1e-3, "a network that says something"
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not any("normalization" in n for n, _ in folded.named_modules() if "embedder" not in n)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_are_whole_or_not_crossed():
    found = chain(*[node(4, 4)] * 6, blocks=[Block(0, 2), Block(2, 4), Block(4, 6)])
    got = spans(found.segments([1.0] * 6, 99))
    inside = {(i, i + 1) for i in range(6)}
    whole = {(a, b) for a, b in combinations((0, 2, 4, 6), 2)}
    assert got == inside | whole
    assert found.inside(Segment(0, 1, 3, (1,))) == Block(0, 2)
    assert found.inside(Segment(0, 2, 5, (1, 2))) is None
    assert found.folded(Segment(0, 4, 1, ())) == [Block(0, 2), Block(2, 4)]


def test_convolutions_that_change_the_shape_stay():
    found = chain(node(3, 4), node(4, 4), node(4, 4, 3, 2), node(4, 4, 1))
    for segment in found.segments([1.0] * 4, 99):
        needed = {1, 3} & set(range(segment.start + 1, segment.end + 1))
        assert needed <= set(segment.kept)
    assert found.kernel(0, 2, (2,)) is None and found.kernel(2, 3, ()) is None


def test_behind_a_stride_only_1x1_is_kept():
    found = chain(node(4, 4, 3, 2), node(4, 4), node(4, 6, 1), node(6, 6))
    segments = found.segments([1.0] * 4, 99)
    assert {s.kept for s in segments if (s.start, s.end) == (0, 4)} == {(1, 3)}
    assert found.kernel(0, 2, (1, 2)) is None and found.kernel(0, 3, (1, 3)) == 3
    # one that would have to stay makes the segment impossible
    blocked = chain(node(4, 4, 3, 2), node(4, 6))
    assert spans(blocked.segments([1.0] * 2, 99)) == {(0, 1), (1, 2)}


def test_of_each_kernel_the_convolutions_with_the_largest_norms():
    found = chain(*[node(4, 4, k) for k in (3, 5, 3, 1, 3)])
    norms = [1.0, 5.5, 3.0, 0.1, 2.0]
    by_kernel = {s.kernel: s for s in found.segments(norms, 99) if (s.start, s.end) == (0, 5)}
    for kernel, segment in by_kernel.items():
        assert 4 in segment.kept, "a 1x1 convolution costs nothing"
        sets = [c for n in range(6) for c in combinations(range(1, 6), n)]
        best = max(
            (c for c in sets if found.kernel(0, 5, c) == kernel),
            key=lambda kept: sum(norms[i - 1] for i in kept),
        )
        assert segment.kept == best
    assert sorted(by_kernel) == [1, 3, 5, 7, 9, 11]
    assert max(s.kernel for s in found.segments(norms, 3)) == 5, "a convolution's own is allowed"
    assert max(s.kernel for s in found.segments(norms, 3) if s.end > s.start + 1) == 3


@pytest.mark.parametrize("name", ["basic", "bottleneck", "mobilenet", "mobilenet, centred"])
def test_every_segment_is_its_kept_convolutions_in_a_row(name):
    """The module in the network against one convolution after the other, shortcuts added, padding
    in front: of all segments of a network, none left out."""
    model = NETWORKS[name]()
    found = chain_of(model)
    weights = weights_of(model, found)
    segments = found.segments(weights.norms(), 5)
    if name.startswith("mobilenet"):
        segments = [s for s in segments if s.start < 9 or s.end > 49]
    for segment in segments:
        shape = shape_of(found, segment)
        merged = weights.merged(found, segment)
        assert (merged.kernel, merged.stride) == (shape.kernel, shape.stride), segment
        assert (merged.padding, merged.same) == (shape.padding, shape.same)
        assert merged.depthwise == shape.depthwise
        assert (merged.inputs, merged.outputs) == (shape.inputs, shape.outputs)
        # far from the border, where it is the same without moving the padding
        x = torch.randn(1, shape.inputs, 24, 24, dtype=torch.float64)
        expected = x
        blocks = {b.start: b for b in found.folded(segment)}
        at = segment.start
        while at < segment.end:
            block = blocks.get(at)
            stop = at + 1 if block is None else block.end
            branch = [weights.nodes[i] for i in range(at + 1, stop + 1) if i in segment.kept]
            made = sequence_reference(branch, expected)
            if block is not None:
                shortcut = weights.shortcuts.get(block.end)
                beside = expected if shortcut is None else sequence_reference([shortcut], expected)
                made = made + beside if branch else beside
            expected, at = made, stop
        got = sequence_reference([merged], x)
        edge = 8 // shape.stride
        middle = (..., slice(edge, -edge), slice(edge, -edge))
        torch.testing.assert_close(got[middle], expected[middle])


def test_plans_that_do_not_fit_are_refused():
    found = chain(*[node(4, 4)] * 4, blocks=[Block(0, 2), Block(2, 4)])
    good = [Segment(0, 2, 3, (2,)), Segment(2, 4, 1, ())]
    found.check(good)
    for bad, message in (
        (good[:1], "end at 2 of 4"),
        ([Segment(0, 3, 1, ()), Segment(3, 4, 1, ())], "does not fit the network at 0"),
        ([good[1]], "at 0"),
        ([Segment(0, 2, 3, (3,)), good[1]], "at 0"),
        ([Segment(0, 2, 5, (2,)), good[1]], "no kernel of that size"),
    ):
        with pytest.raises(InputError, match=message):
            found.check(bad)


def test_a_slot_in_which_nothing_ends_passes_on():
    model = resnet()
    found = chain_of(model)
    weights = weights_of(model, found)
    long = [s for s in found.segments(weights.norms(), 7) if (s.start, s.end) == (2, 8)]
    plan = [*found.dense[:2], long[-1]]
    made = fused(model, found, weights, plan)
    assert [type(m).__name__ for m, _ in located(made, found, plan).values()] == ["Merged"] * 3
    assert len(made.get_submodule("resnet.encoder.stages.0.layers")) == 1
    assert made(pictures(2)[0]).logits.shape == (2, 4)


def test_a_dropped_block_is_gone():
    """The activation in front of it let through what it would let through, and a branch of dropped
    convolutions does not add its input a second time."""
    model = resnet()
    found = chain_of(model)
    weights = weights_of(model, found)
    plan = [Segment(0, 2, 1, ()), *found.dense[2:]]
    made = fused(model, found, weights, plan)
    model.resnet.encoder.stages[0].layers[0] = torch.nn.Identity()
    pixels = pictures(3)[0]
    with torch.no_grad():
        torch.testing.assert_close(made(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)


def test_other_networks_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"dilation \(2, 2\)"):
        chain_of(mobilenet(output_stride=8))
    with pytest.raises(UnsupportedModelError, match="ResNetModel.*supported: ResNetFor"):
        chain_of(resnet().resnet)
    with pytest.raises(UnsupportedModelError, match="2 groups"):
        node_of("here", torch.nn.Conv2d(4, 4, 3, padding=1, groups=2), None)
    with pytest.raises(ValueError, match="overlap"):
        chain(*[node(4, 4)] * 3, blocks=[Block(0, 2), Block(1, 3)])
    with pytest.raises(ValueError, match="last slot"):
        Chain((node(4, 4),), (), (Slot("x", 2),))


def test_sizes_at_boundaries():
    from liar_ext.convolution.measure import Dense

    model = resnet()
    found = chain_of(model)
    weights = weights_of(model, found)
    folded = fused(model, found, weights, found.dense)
    dense = Dense(folded, found, weights, [], 1, 0)
    sizes = input_shapes(dense, (1, 32, 32))
    assert sizes[0] == (6, 8, 8) and sizes[7] == (8, 4, 4) and len(sizes) == 8

"""One convolution for many: the same function, and where at the border it is another one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liar_ext.convolution.algebra import (
    Conv,
    add,
    compose,
    compose_all,
    fold_normalization,
    identity,
    interior,
    moved,
    same_padding,
    sequence_reference,
)


def conv(inputs, outputs, kernel, stride=1, *, depthwise=False, padding=None, same=0):
    shape = (outputs, 1 if depthwise else inputs, kernel, kernel)
    return Conv(
        torch.randn(shape, dtype=torch.float64),
        torch.randn(outputs, dtype=torch.float64),
        stride,
        (0 if same else kernel // 2) if padding is None else padding,
        depthwise,
        same,
    )


SEQUENCES = {
    "two": lambda: [conv(3, 4, 3), conv(4, 5, 3)],
    "three": lambda: [conv(3, 4, 3), conv(4, 4, 5), conv(4, 2, 3)],
    "inverted residual": lambda: [
        conv(3, 6, 1),
        conv(6, 6, 3, depthwise=True),
        conv(6, 2, 1),
    ],
    "depthwise": lambda: [conv(4, 4, 3, depthwise=True), conv(4, 4, 5, depthwise=True)],
    "stride last": lambda: [conv(3, 4, 3), conv(4, 5, 3, 2)],
    "stride, then 1x1": lambda: [conv(3, 4, 3, 2), conv(4, 5, 1)],
    "stride, then 3x3": lambda: [conv(3, 4, 3, 2), conv(4, 5, 3)],
    "two strides": lambda: [conv(3, 4, 3, 2), conv(4, 5, 1, 2)],
    "TensorFlow": lambda: [conv(3, 4, 3), conv(4, 4, 3, 2, same=3), conv(4, 2, 1)],
    "one channel": lambda: [conv(1, 1, 3), conv(1, 1, 3, depthwise=True)],
}


@pytest.mark.parametrize("size", [(12, 12), (11, 13)], ids=["even", "odd"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_composed_is_the_sequence_with_its_padding_in_front_everywhere(name, size):
    convs = SEQUENCES[name]()
    x = torch.randn(2, convs[0].inputs, *size, dtype=torch.float64)
    merged = compose_all(convs, convs[0].inputs)
    got = sequence_reference([merged], x)
    if name != "TensorFlow":  # how much it pads between depends on the image, and is not moved
        torch.testing.assert_close(got, sequence_reference(moved(convs), x))
    plain = sequence_reference(convs, x)
    assert got.shape == plain.shape
    edge = interior(convs)
    inside = (..., slice(edge, got.shape[-2] - edge), slice(edge, got.shape[-1] - edge))
    assert got[inside].numel()
    torch.testing.assert_close(got[inside], plain[inside])


def test_border_pixels_differ_because_of_what_is_padded_between():
    """A bias alone: in front of the second convolution zeros are padded, in front of the first one
    zeros become the bias."""
    first, second = conv(2, 3, 3), conv(3, 2, 3)
    x = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    plain = sequence_reference([first, second], x)
    merged = sequence_reference([compose(first, second)], x)
    differ = (plain - merged).abs().amax((0, 1)) > 1e-9
    expected = torch.ones(7, 7, dtype=torch.bool)
    expected[1:-1, 1:-1] = False
    assert torch.equal(differ, expected), "exactly the ring as wide as the second's padding"
    unpadded = [conv(2, 3, 3), conv(3, 2, 1)]
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(
        sequence_reference([compose_all(unpadded, 2)], x), sequence_reference(unpadded, x)
    )
    assert interior(unpadded) == 0


def test_depthwise_stays_depthwise_only_if_all_are():
    one, two = conv(4, 4, 3, depthwise=True), conv(4, 4, 3, depthwise=True)
    assert compose(one, two).depthwise and compose(one, two).weight.shape == (4, 1, 5, 5)
    assert not compose(one, conv(4, 4, 1)).depthwise
    assert not compose(conv(4, 4, 1), two).depthwise


def test_identity_changes_nothing_on_either_side():
    for other in (conv(3, 3, 3), conv(3, 3, 3, 2), conv(3, 3, 3, depthwise=True)):
        for merged in (compose(identity(3), other), compose(other, identity(3))):
            assert torch.equal(merged.weight, other.weight) and merged.padding == other.padding
            assert torch.equal(merged.bias, other.bias) and merged.depthwise == other.depthwise
    assert compose_all([], 3).weight.shape == (3, 1, 1, 1)


@pytest.mark.parametrize("kind", ["identity", "projection", "depthwise"])
def test_a_residual_block_without_activations_is_one_convolution(kind):
    depthwise = kind == "depthwise"
    stride = 2 if kind == "projection" else 1
    branch = [conv(4, 4, 3, stride, depthwise=depthwise)]
    if kind == "identity":
        branch.append(conv(4, 4, 1))
    shortcut = conv(4, 4, 1, stride) if kind == "projection" else identity(4)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    merged = add(compose_all(branch, 4), shortcut)
    expected = sequence_reference(branch, x) + sequence_reference([shortcut], x)
    torch.testing.assert_close(sequence_reference([merged], x), expected)
    assert merged.depthwise == depthwise


def test_batch_norm_is_folded_in():
    module, norm = nn.Conv2d(3, 5, 3, padding=1).double(), nn.BatchNorm2d(5, eps=0.01).double()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3)
    norm.eval()
    spread = (norm.running_var + norm.eps).sqrt()
    weight, bias = fold_normalization(
        *(module.weight.detach(), module.bias.detach(), norm.weight.detach(), norm.bias.detach()),
        *(norm.running_mean, spread),
    )
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    got = sequence_reference([Conv(weight, bias, 1, 1)], x)
    torch.testing.assert_close(got, norm(module(x)).detach())


def test_tensorflow_pads_one_more_behind_where_it_has_to():
    assert same_padding(8, 3, 2) == (0, 1)
    assert same_padding(9, 3, 2) == (1, 1)
    assert same_padding(9, 1, 2) == (0, 0)


def test_what_cannot_be_one_convolution_is_refused():
    strided, sparse = conv(4, 4, 3, 2, same=3), conv(4, 4, 1, 2)
    for first, second in (
        (strided, conv(4, 4, 3)),
        (strided, strided),
        (strided, sparse),
        (conv(3, 4, 3, 2), strided),
    ):
        with pytest.raises(ValueError, match="TensorFlow"):
            compose(first, second)
    with pytest.raises(ValueError, match="4 outputs"):
        compose(conv(3, 4, 3), conv(3, 4, 3))
    with pytest.raises(ValueError, match="strides"):
        add(conv(4, 4, 3, 2), identity(4))
    with pytest.raises(ValueError, match="centred"):
        add(conv(4, 4, 3, padding=0), identity(4))
    with pytest.raises(ValueError, match="cannot be centred"):
        conv(4, 4, 2).widened(3)
    with pytest.raises(ValueError, match="square"):
        Conv(torch.zeros(1, 1, 1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="depthwise"):
        Conv(torch.zeros(2, 2, 1, 1), torch.zeros(2), depthwise=True)

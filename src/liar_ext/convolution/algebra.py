"""Convolutions as values: composed, added, with their batch norm folded in. All in float64.

Two convolutions in a row, `b` after `a`, are one (LayerMerge, 2406.12837, section 3.1):

    W[o, i, u] = Σ_m Σ_v W_b[o, m, v] W_a[m, i, u − s_a v]
    bias[o]    = b_b[o] + Σ_m Σ_v W_b[o, m, v] b_a[m]

with kernel `k_a + s_a (k_b − 1)`, stride `s_a s_b` and padding `p_a + s_a p_b`: all of the padding
is in front. The two in a row pad again between them, with zeros. In front of the first convolution
a pixel that is padded becomes what `a` makes of zeros and of the image's edge, its bias included.
So pixels that look no further than the image are the same to rounding, and a border as wide as the
later paddings is not: `interior` says how wide, `moved` has the sequence that is equal everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Conv:
    """One convolution without dilation, square.

    Attributes:
        weight: (out, in, k, k) float64, or (channels, 1, k, k) where it is depthwise.
        bias: (out,) float64.
        stride: of both sides.
        padding: zeros on each side.
        depthwise: each channel has a kernel of its own and nothing else; a convolution of one
            channel may be either.
        same: where not 0, TensorFlow pads for a strided kernel of this size on top of `padding`:
            how much depends on the size of the image, and there may be one zero more behind.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    depthwise: bool = False
    same: int = 0

    def __post_init__(self) -> None:
        out, own, rows, columns = self.weight.shape
        if rows != columns or self.bias.shape != (out,):
            raise ValueError(
                f"a convolution has a square kernel and a bias for each output; got "
                f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        if self.depthwise and own != 1:
            raise ValueError(f"a depthwise convolution has (channels, 1, k, k); got {own} inputs")

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.outputs if self.depthwise else self.weight.shape[1]

    def dense(self) -> Conv:
        """The same with a full kernel, which has zeros beside its diagonal."""
        if not self.depthwise:
            return self
        full = self.weight.new_zeros(self.outputs, self.outputs, self.kernel, self.kernel)
        channels = torch.arange(self.outputs)
        full[channels, channels] = self.weight[:, 0]
        return replace(self, weight=full, depthwise=False)

    def widened(self, kernel: int) -> Conv:
        """The same function with a larger kernel, zeros around it and as much more padding."""
        more, odd = divmod(kernel - self.kernel, 2)
        if more < 0 or odd:
            raise ValueError(f"a kernel of {self.kernel} cannot be centred in one of {kernel}")
        wide = functional.pad(self.weight, (more,) * 4)
        return replace(self, weight=wide, padding=self.padding + more)


def identity(channels: int) -> Conv:
    """What a dropped convolution is: one weight of 1 for each channel (Dirac)."""
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return Conv(ones, torch.zeros(channels, dtype=torch.float64), depthwise=True)


def fold_normalization(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, mean: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm behind it folded in.

    `W' = W γ/σ`, `b' = β + (b − μ) γ/σ`, float64; of a norm in eval mode.

    Args:
        weight: (out, ...); bias: (out,) or None; scale, shift, mean: γ, β, μ (out,).
        spread: σ (out,), the square root of the running variance plus ε.
    """
    factor = scale.double() / spread.double()
    folded = weight.double() * factor.reshape(-1, *(1,) * (weight.dim() - 1))
    own = torch.zeros_like(factor) if bias is None else bias.double()
    return folded, shift.double() + (own - mean.double()) * factor


def compose(first: Conv, second: Conv) -> Conv:
    """The one convolution that is `second` after `first`; see above for the border.

    Depthwise if both are.

    Raises:
        ValueError: their channels do not fit, or TensorFlow pads between them: how much depends on
            the image.
    """
    if first.outputs != second.inputs:
        raise ValueError(f"{first.outputs} outputs do not go into {second.inputs} inputs")
    if first.same and (second.kernel > 1 or second.stride > 1):
        raise ValueError(
            "behind a strided convolution that TensorFlow pads, only 1x1 ones without a stride are "
            "merged"
        )
    if second.same and first.stride > 1:
        raise ValueError("TensorFlow's padding of the second would depend on the first's output")
    depthwise = first.depthwise and second.depthwise
    a, b = (first, second) if depthwise else (first.dense(), second.dense())
    size = first.kernel + first.stride * (second.kernel - 1)
    inputs = 1 if depthwise else first.inputs
    weight = a.weight.new_zeros(second.outputs, inputs, size, size)
    equation = "cd,cikl->cikl" if depthwise else "om,mikl->oikl"
    for row in range(second.kernel):
        for column in range(second.kernel):
            tap = torch.einsum(equation, b.weight[:, :, row, column], a.weight)
            down, right = first.stride * row, first.stride * column
            weight[:, :, down : down + first.kernel, right : right + first.kernel] += tap
    sums = b.weight.sum((2, 3))
    carried = sums[:, 0] * first.bias if depthwise else sums @ first.bias
    return Conv(
        weight,
        second.bias + carried,
        first.stride * second.stride,
        first.padding + first.stride * second.padding,
        depthwise,
        first.same or second.same,
    )


def compose_all(convs: Sequence[Conv], channels: int) -> Conv:
    """All of them in a row; of none, the identity of so many channels."""
    merged: Conv | None = None
    for conv in convs:
        merged = conv if merged is None else compose(merged, conv)
    return identity(channels) if merged is None else merged


def add(branch: Conv, shortcut: Conv) -> Conv:
    """The one convolution that is the sum of two on the same input: a residual block without
    activations. Exact everywhere: none of the two pads between anything.

    Raises:
        ValueError: other channels or strides, or kernels that are not centred on each other.
    """
    if (branch.inputs, branch.outputs, branch.stride) != (
        *(shortcut.inputs, shortcut.outputs, shortcut.stride),
    ):
        raise ValueError("a block and its shortcut must have the same channels and strides")
    kernel = max(branch.kernel, shortcut.kernel)
    a, b = branch.widened(kernel), shortcut.widened(kernel)
    if a.padding != b.padding or a.same != b.same:
        raise ValueError(f"kernels are not centred: paddings {a.padding} and {b.padding}")
    depthwise = a.depthwise and b.depthwise
    if not depthwise:
        a, b = a.dense(), b.dense()
    return replace(a, weight=a.weight + b.weight, bias=a.bias + b.bias, depthwise=depthwise)


def moved(convs: Sequence[Conv]) -> list[Conv]:
    """The sequence with all of its padding in front of the first one: what they merge into."""
    padding, stride = 0, 1
    for conv in convs:
        padding += stride * conv.padding
        stride *= conv.stride
    return [replace(c, padding=0 if i else padding) for i, c in enumerate(convs)]


def interior(convs: Sequence[Conv]) -> int:
    """Output pixels from each edge on which `moved` may differ from the sequence itself.

    The padding of each one but the first, carried through the strides behind it and rounded up.
    """
    width = 0
    for conv in convs[1:]:
        # what lies outside its input, and what differed there, reaches this far into its output
        width = -(-(width + conv.padding + conv.same // 2) // conv.stride)
    return width


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros in front of and behind `size` pixels, as TensorFlow pads ("SAME")."""
    along = kernel - stride if size % stride == 0 else kernel - size % stride
    front = max(along, 0) // 2
    return front, max(along, 0) - front


def padded(x: Tensor, padding: int, same: int, stride: int) -> Tensor:
    """x (n, c, h, w) with the zeros that a convolution is given."""
    if not same:
        return functional.pad(x, (padding,) * 4) if padding else x
    top, bottom = same_padding(x.shape[-2], same, stride)
    left, right = same_padding(x.shape[-1], same, stride)
    return functional.pad(
        x, (padding + left, padding + right, padding + top, padding + bottom), "constant", 0.0
    )


def sequence_reference(convs: Sequence[Conv], x: Tensor) -> Tensor:
    """The definition: one convolution after the other, each with its own padding, in float64."""
    x = x.double()
    for conv in convs:
        x = functional.conv2d(
            padded(x, conv.padding, conv.same, conv.stride),
            *(conv.weight, conv.bias, conv.stride),
            groups=conv.outputs if conv.depthwise else 1,
        )
    return x

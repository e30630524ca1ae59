"""A network as a chain of convolutions and activations, and what may become of it.

Nodes 1 to L are convolutions, boundaries 0 to L lie between them; behind node l, at boundary l,
stands its activation or none. A segment (i, j] is one convolution in the place of nodes i + 1 to j:
the activations inside it are gone, and of its convolutions some are dropped (LayerMerge,
2406.12837, sections 3 and 4). What may be a segment:

- A residual block lies in it as a whole, or it lies in the block, or they have nothing in common.
  A block that lies in it as a whole is folded: its shortcut is a 1x1 convolution or the identity,
  beside the branch. A block of which nothing is kept is its shortcut.
- Convolutions that change the number of channels or have a stride stay.
- Behind a stride only 1x1 convolutions are kept; larger ones there would have to look at pixels
  that are not computed any more (the kernel would grow by the stride).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.errors import InputError, UnsupportedModelError


@dataclass(frozen=True)
class Node:
    """One convolution with its norm, as the config describes it.

    Attributes:
        path: of the module that has both, in the model.
        padding: zeros on each side; same: see `algebra.Conv`.
        activation: name of what stands behind it, None for nothing. Of the last one of a residual
            block: behind the sum.
    """

    path: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    same: int
    depthwise: bool
    activation: str | None

    @property
    def irreducible(self) -> bool:
        """Whether it must stay: the identity has its input's shape."""
        return self.inputs != self.outputs or self.stride > 1


@dataclass(frozen=True)
class Block:
    """A residual block: boundaries `start` to `end`, where the shortcut is added.

    Attributes:
        shortcut: as a node without an activation, or None for the identity.
    """

    start: int
    end: int
    shortcut: Node | None = None


@dataclass(frozen=True)
class Slot:
    """A module of the stock model that calls a part of the chain, up to a boundary."""

    path: str
    end: int


@dataclass(frozen=True)
class Segment:
    """Nodes start + 1 to end as one convolution.

    Attributes:
        kept: of these nodes, ascending; the others are the identity.
        kernel: of the result, `1 + Σ (k − 1)` over the kept ones.
    """

    start: int
    end: int
    kernel: int
    kept: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int, int]:
        return self.start, self.end, self.kernel

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "end": self.end,
            "kernel": self.kernel,
            "kept": list(self.kept),
        }


@dataclass(frozen=True)
class Chain:
    """All of it. Nodes are counted from 1: `node(l)` is `nodes[l - 1]`.

    Attributes:
        entry: activation that what enters the chain has behind it already, if any.
    """

    nodes: tuple[Node, ...]
    blocks: tuple[Block, ...]
    slots: tuple[Slot, ...]
    entry: str | None = None

    def __post_init__(self) -> None:
        for before, block in pairwise(self.blocks):
            if before.end > block.start:
                raise ValueError("blocks must be in order and not overlap")
        if not self.slots or self.slots[-1].end != len(self.nodes):
            raise ValueError("the last slot must end with the chain")

    @property
    def length(self) -> int:
        return len(self.nodes)

    def node(self, index: int) -> Node:
        return self.nodes[index - 1]

    def channels(self, boundary: int) -> int:
        """Of what passes a boundary."""
        return self.node(boundary).outputs if boundary else self.nodes[0].inputs

    def activation(self, boundary: int) -> str | None:
        """What stands at a boundary of the dense network."""
        return self.node(boundary).activation if boundary else self.entry

    @cached_property
    def dense(self) -> tuple[Segment, ...]:
        """Every node its own segment."""
        return tuple(
            Segment(i, i + 1, self.node(i + 1).kernel, (i + 1,)) for i in range(self.length)
        )

    def inside(self, segment: Segment) -> Block | None:
        """The residual block in which a segment lies without being all of it, or None."""
        for block in self.blocks:
            if block.start <= segment.start and segment.end <= block.end:
                whole = (block.start, block.end) == (segment.start, segment.end)
                return None if whole else block
        return None

    def folded(self, segment: Segment) -> list[Block]:
        """The residual blocks that are in a segment as a whole."""
        return [b for b in self.blocks if segment.start <= b.start and b.end <= segment.end]

    def feasible(self, start: int, end: int) -> bool:
        """Whether (start, end] may be a segment, whatever of it is kept."""
        for block in self.blocks:
            apart = end <= block.start or block.end <= start
            within = block.start <= start and end <= block.end
            around = start <= block.start and block.end <= end
            if not (apart or within or around):
                return False
        return True

    def check(self, plan: Sequence[Segment]) -> None:
        """Raise InputError unless these are segments of this chain, one behind the other."""
        at = 0
        for segment in plan:
            start, end, kept = segment.start, segment.end, segment.kept
            fits = start == at and start < end <= self.length and self.feasible(start, end)
            inside = all(start < index <= end for index in kept)
            if not (fits and inside and tuple(sorted(set(kept))) == kept):
                raise InputError(f"segment {segment.to_json()} does not fit the network at {at}")
            if self.kernel(start, end, kept) != segment.kernel:
                raise InputError(
                    f"segment {segment.to_json()}: what it keeps makes no kernel of that size"
                )
            at = end
        if at != self.length:
            raise InputError(f"the segments end at {at} of {self.length} convolutions")

    def kernel(self, start: int, end: int, kept: Sequence[int]) -> int | None:
        """The kernel of a segment that keeps these nodes, or None where it may not."""
        growth, strided = 0, False
        for index in range(start + 1, end + 1):
            node = self.node(index)
            if index not in kept:
                if node.irreducible:
                    return None
                continue
            if strided and node.kernel > 1:
                return None
            growth += node.kernel - 1
            strided = strided or node.stride > 1
        return growth + 1

    def segments(self, importance: Sequence[float], largest: int) -> list[Segment]:
        """All segments, one for each (start, end, kernel): of the sets of convolutions that make
        that kernel the one with the largest sum.

        Args:
            importance: of each node, as its l1 norm.
            largest: kernels above this are left out, but for a convolution that has one.
        """
        found = []
        for start in range(self.length):
            for end in range(start + 1, self.length + 1):
                if self.feasible(start, end):
                    limit = max(largest, self.node(end).kernel if end == start + 1 else 0)
                    found += list(self._choices(start, end, importance, limit))
        return found

    def _choices(
        self, start: int, end: int, importance: Sequence[float], largest: int
    ) -> Iterator[Segment]:
        # growth -> (sum, kept): a knapsack over what may be left out
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        strided = False
        for index in range(start + 1, end + 1):
            node = self.node(index)
            if strided and node.kernel > 1:
                if node.irreducible:
                    return
                continue
            # a 1x1 convolution costs no growth: dropping it would gain nothing
            stays = node.irreducible or node.kernel == 1
            after: dict[int, tuple[float, tuple[int, ...]]] = {} if stays else dict(best)
            for growth, (total, kept) in best.items():
                grown = growth + node.kernel - 1
                value = (total + importance[index - 1], (*kept, index))
                if grown < largest and (grown not in after or value > after[grown]):
                    after[grown] = value
            best = after
            strided = strided or node.stride > 1
        for growth in sorted(best):
            yield Segment(start, end, growth + 1, best[growth][1])


def node_of(
    path: str, module: nn.Conv2d, activation: str | None, *, tensorflow: bool = False
) -> Node:
    """A convolution of a model, which may be on `meta`, as a node."""
    kernel, stride = module.kernel_size[0], module.stride[0]
    depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
    square = module.kernel_size == (kernel, kernel) and module.stride == (stride, stride)
    plain = square and module.dilation == (1, 1) and kernel % 2 == 1
    centred = tensorflow or module.padding == (kernel // 2, kernel // 2)
    if not (plain and centred and (depthwise or module.groups == 1)):
        raise UnsupportedModelError(
            f"{path}: a convolution with kernel {module.kernel_size}, stride {module.stride}, "
            f"padding {module.padding}, dilation {module.dilation}, {module.groups} groups; only "
            "square, odd, centred ones without dilation, full or depthwise, can be merged"
        )
    # with a stride TensorFlow's zeros depend on the size of the image
    same = kernel if tensorflow and stride > 1 else 0
    padding = 0 if same else kernel // 2
    return Node(
        *(path, module.in_channels, module.out_channels, kernel, stride, padding, same),
        depthwise,
        activation,
    )


def chain_of(model: PreTrainedModel) -> Chain:
    """The chain of a model of a family that is declared.

    Raises:
        UnsupportedModelError: another one, by name, or something in it that cannot be described.
    """
    family = _family(model.config, type(model).__name__)
    return family(model)


def check_family(config: PretrainedConfig, architecture: str | None) -> None:
    """Raise UnsupportedModelError unless it is a family with a chain, for image classification."""
    _family(config, architecture)


def _family(config: PretrainedConfig, architecture: str | None) -> Any:
    from liar_ext.convolution import mobilenet_v2, resnet

    families = {
        ("resnet", "ResNetForImageClassification"): resnet.chain,
        ("mobilenet_v2", "MobileNetV2ForImageClassification"): mobilenet_v2.chain,
    }
    found = families.get((config.model_type, architecture or ""))
    if found is None:
        known = ", ".join(name for _, name in families)
        raise UnsupportedModelError(
            f"{architecture or 'no architecture'} (model type {config.model_type!r}) is no "
            f"convolutional network that this version knows; supported: {known}"
        )
    return found

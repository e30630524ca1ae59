"""A plan as modules in the place of a stock model's own, and what `config.json` says of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from liar_ext.convolution.algebra import (
    Conv,
    add,
    compose_all,
    fold_normalization,
    identity,
    padded,
)
from liar_ext.convolution.chain import Block, Chain, Node, Segment, chain_of
from liar_ext.errors import InputError
from liar_ext.models import layout

# what f(f(x)) = f(x) holds for: behind another of itself, one of these is nothing
IDEMPOTENT = ("relu", "relu6")
PLAN = "convolutions"


@dataclass(frozen=True)
class Shape:
    """What a segment's convolution is, without its weights. `empty`: nothing is left to compute,
    it is the identity."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    same: int
    depthwise: bool
    activation: str | None
    empty: bool = False


class Merged(nn.Module):
    """A convolution with a bias, and the activation behind it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.convolution: nn.Module = nn.Identity()
        if not shape.empty:
            self.convolution = nn.Conv2d(
                *(shape.inputs, shape.outputs, shape.kernel, shape.stride),
                padding=0 if shape.same else shape.padding,
                groups=shape.inputs if shape.depthwise else 1,
            )
        self.activation = _activation(shape.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape.same:
            x = padded(x, self.shape.padding, self.shape.same, self.shape.stride)
        return self.activation(self.convolution(x))


class Residual(nn.Module):
    """A residual block of which activations stay inside."""

    def __init__(self, body: Sequence[Merged], shortcut: Merged | None, name: str | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = _activation(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _activation(name: str | None) -> nn.Module:
    return nn.Identity() if name is None else cast(nn.Module, ACT2FN[name])


def shape_of(chain: Chain, segment: Segment) -> Shape:
    """What a segment becomes; a block that it lies in applies the activation itself."""
    kept = [chain.node(index) for index in segment.kept]
    folded = chain.folded(segment)
    block = chain.inside(segment)
    name = chain.activation(segment.end)
    if block is not None and block.end == segment.end:
        name = None
    empty = not kept and all(b.shortcut is None for b in folded)
    if empty and name in IDEMPOTENT and chain.activation(segment.start) == name:
        name = None
    return Shape(
        chain.channels(segment.start),
        chain.channels(segment.end),
        segment.kernel,
        _product(node.stride for node in kept),
        sum(node.padding for node in kept),
        max((node.same for node in kept), default=0),
        all(n.depthwise for n in kept) and all(b.shortcut is None for b in folded),
        name,
        empty,
    )


def shortcut_shape(node: Node) -> Shape:
    return Shape(
        *(node.inputs, node.outputs, node.kernel, node.stride, node.padding, node.same),
        node.depthwise,
        None,
    )


def _product(strides: Any) -> int:
    total = 1
    for stride in strides:
        total *= stride
    return total


@dataclass(frozen=True)
class Weights:
    """Every convolution of the dense network with its norm folded in.

    Attributes:
        nodes: by number; shortcuts: by the boundary that the block ends at.
    """

    nodes: dict[int, Conv]
    shortcuts: dict[int, Conv]

    def norms(self) -> list[float]:
        """`Σ |W|` of every node, in order: batch norm folded in, for without it the size of a
        weight means nothing."""
        return [float(conv.weight.abs().sum()) for conv in self.nodes.values()]

    def merged(self, chain: Chain, segment: Segment) -> Conv:
        """The convolution of a segment: kept ones composed, blocks in it folded."""
        blocks = {block.start: block for block in chain.folded(segment)}
        parts: list[Conv] = []
        at = segment.start
        while at < segment.end:
            block = blocks.get(at)
            stop = at + 1 if block is None else block.end
            own = [self.nodes[i] for i in range(at + 1, stop + 1) if i in segment.kept]
            if block is None:
                parts += own
            else:
                parts.append(self._block(chain, block, own))
            at = stop
        return compose_all(parts, chain.channels(segment.start))

    def _block(self, chain: Chain, block: Block, branch: Sequence[Conv]) -> Conv:
        shortcut = self.shortcuts.get(block.end)
        if shortcut is None:
            shortcut = identity(chain.channels(block.start))
        if not branch:
            # a branch of dropped convolutions is gone, it does not add its input once more
            return shortcut
        return add(compose_all(branch, chain.channels(block.start)), shortcut)


def weights_of(model: PreTrainedModel, chain: Chain) -> Weights:
    """Read them from a dense model, which is not changed.

    Raises:
        InputError: a weight or a norm's statistic is NaN or infinite.
    """
    nodes = {index: _folded(model, node) for index, node in enumerate(chain.nodes, 1)}
    shortcuts = {b.end: _folded(model, b.shortcut) for b in chain.blocks if b.shortcut is not None}
    return Weights(nodes, shortcuts)


def _folded(model: PreTrainedModel, node: Node) -> Conv:
    module = cast(Any, model.get_submodule(node.path))
    convolution, norm = module.convolution, module.normalization
    own = convolution.weight.detach().cpu()
    bias = None if convolution.bias is None else convolution.bias.detach().cpu()
    values = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    scale, shift, mean, variance = (value.detach().cpu().double() for value in values)
    weight, bias = fold_normalization(own, bias, scale, shift, mean, (variance + norm.eps).sqrt())
    if not bool(weight.isfinite().all() & bias.isfinite().all()):
        raise InputError(f"{node.path}: weights or batch norm statistics are NaN or infinite")
    return Conv(weight, bias, node.stride, node.padding, node.depthwise, node.same)


def assemble(chain: Chain, plan: Sequence[Segment]) -> list[tuple[int, Merged | Residual]]:
    """The modules of a plan, with the boundary that each ends at; weights are not set."""
    made: list[tuple[int, Merged | Residual]] = []
    body: list[Merged] = []
    for segment in plan:
        merged = Merged(shape_of(chain, segment))
        block = chain.inside(segment)
        if block is None:
            made.append((segment.end, merged))
            continue
        body.append(merged)
        if segment.end == block.end:
            own = None if block.shortcut is None else Merged(shortcut_shape(block.shortcut))
            made.append((segment.end, Residual(body, own, chain.activation(block.end))))
            body = []
    return made


def install(model: PreTrainedModel, chain: Chain, plan: Sequence[Segment]) -> None:
    """Put the modules of a plan where the model calls its own, in place; weights are not set.

    Each module is in the slot in which it ends; a slot in which nothing ends passes on what it is
    given.
    """
    made = assemble(chain, plan)
    start = 0
    for slot in chain.slots:
        inside = [module for end, module in made if start < end <= slot.end]
        model.set_submodule(slot.path, nn.Sequential(*inside))
        start = slot.end


def located(
    model: PreTrainedModel, chain: Chain, plan: Sequence[Segment]
) -> dict[Segment, tuple[Merged, Residual | None]]:
    """The module of each segment in a model that has this plan, and the block it is in."""
    parts = [part for slot in chain.slots for part in cast(Any, model.get_submodule(slot.path))]
    found: list[tuple[Merged, Residual | None]] = []
    for part in parts:
        if isinstance(part, Residual):
            found += [(cast(Merged, inner), part) for inner in part.body]
        else:
            found.append((part, None))
    return dict(zip(plan, found, strict=True))


def fused(
    model: PreTrainedModel, chain: Chain, weights: Weights, plan: Sequence[Segment]
) -> PreTrainedModel:
    """A model with this plan, on the device and in the dtype of the dense one, which stays."""
    chain.check(plan)
    first = next(model.parameters())
    # the chain's own modules are replaced: copying them would cost as much as the model
    slots = {id(model.get_submodule(slot.path)) for slot in chain.slots}
    memo = {key: nn.Identity() for key in slots}
    made = copy.deepcopy(model, cast(Any, memo))
    install(made, chain, plan)
    for segment, (merged, _) in located(made, chain, plan).items():
        if not merged.shape.empty:
            set_weights(merged, weights.merged(chain, segment))
    for block, residual in _residuals(made, chain, plan):
        if block.end in weights.shortcuts:
            set_weights(cast(Merged, residual.shortcut), weights.shortcuts[block.end])
    cast(nn.Module, made).to(first.device, first.dtype)
    return made.eval()


def _residuals(
    model: PreTrainedModel, chain: Chain, plan: Sequence[Segment]
) -> list[tuple[Block, Residual]]:
    found: dict[int, tuple[Block, Residual]] = {}
    for segment, (_, residual) in located(model, chain, plan).items():
        if residual is not None:
            block = cast(Block, chain.inside(segment))
            found[block.end] = (block, residual)
    return list(found.values())


@torch.no_grad()
def set_weights(merged: Merged, conv: Conv) -> None:
    """Copy a convolution's values into a module."""
    module = cast(nn.Conv2d, merged.convolution)
    if module.weight.shape != conv.weight.shape:
        conv = conv.dense()
    module.weight.copy_(conv.weight)
    cast(Tensor, module.bias).copy_(conv.bias)


@torch.no_grad()
def get_weights(merged: Merged) -> Conv:
    """A module's convolution as a value, on its device."""
    module, shape = cast(nn.Conv2d, merged.convolution), merged.shape
    return Conv(
        module.weight.detach().double(),
        cast(Tensor, module.bias).detach().double(),
        *(shape.stride, shape.padding, shape.depthwise, shape.same),
    )


def counted(model: PreTrainedModel) -> tuple[int, int]:
    """Convolutions and activations in the place of a chain: shortcuts are not counted, and an
    activation that has become nothing is none."""
    parts = [m for m in model.modules() if isinstance(m, Merged | Residual)]
    convolutions = [m.convolution for m in parts if isinstance(m, Merged)]
    shortcuts = [m for m in parts if isinstance(m, Residual) and isinstance(m.shortcut, Merged)]
    return (
        sum(not isinstance(c, nn.Identity) for c in convolutions) - len(shortcuts),
        sum(not isinstance(m.activation, nn.Identity) for m in parts),
    )


def describe(dense: dict[str, Any], plan: Sequence[Segment]) -> dict[str, Any]:
    """The `config.json` of a model with a plan.

    The family's class would load such a folder with new weights and a warning, were it asked by
    name: an activation that it does not know is in the place of its own, which is in the key.
    """
    data = copy.deepcopy(dense)
    data[layout.KEY] = {
        "version": layout.VERSION,
        "base_model_type": data["model_type"],
        "hidden_act": data.get("hidden_act"),
        PLAN: [segment.to_json() for segment in plan],
    }
    return data | {"model_type": layout.KEY, "hidden_act": layout.KEY}


def build(data: dict[str, Any]) -> PreTrainedModel:
    """The empty model that such a `config.json` describes, parameters on `meta`.

    Raises:
        InputError: a malformed key, or segments that do not fit the network.
    """
    key = data[layout.KEY]
    try:
        plan = [Segment(s["start"], s["end"], s["kernel"], tuple(s["kept"])) for s in key[PLAN]]
        base = {**data, "model_type": key["base_model_type"], "hidden_act": key["hidden_act"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"config.json: {layout.KEY}.{PLAN} is malformed ({error!r})") from error
    del base[layout.KEY]
    if base["hidden_act"] is None:
        del base["hidden_act"]
    model = layout.empty_model(layout.config_object(base))
    chain = chain_of(model)
    chain.check(plan)
    with torch.device("meta"):
        install(model, chain, plan)
    # saved again, stock loaders are to refuse it again
    setattr(model.config, layout.KEY, key)
    model.config.hidden_act = layout.KEY
    return model.eval()

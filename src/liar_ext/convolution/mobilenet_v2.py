"""The chain of a MobileNetV2: all of it, from the first convolution to the pooling.

Behind a block there is no activation: a boundary there is for nothing but a segment's end.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from liar_ext.convolution.chain import Block, Chain, Node, Slot, node_of

ROOT = "mobilenet_v2"
STEM = ("first_conv", "expand_1x1", "conv_3x3", "reduce_1x1")


def chain(model: PreTrainedModel) -> Chain:
    """A slot for the stem, each block, and the last convolution."""
    config = model.config
    nodes: list[Node] = []
    blocks: list[Block] = []
    slots: list[Slot] = []

    def append(path: str, module: Any) -> None:
        activation = config.hidden_act if module.activation is not None else None
        nodes.append(node_of(path, module.convolution, activation, tensorflow=config.tf_padding))

    stem = cast(Any, model.get_submodule(f"{ROOT}.conv_stem"))
    for name in STEM:
        if getattr(stem, name) is not None:
            append(f"{ROOT}.conv_stem.{name}", getattr(stem, name))
    slots.append(Slot(f"{ROOT}.conv_stem", len(nodes)))
    for place, layer in enumerate(cast(nn.ModuleList, model.get_submodule(f"{ROOT}.layer"))):
        start, here = len(nodes), f"{ROOT}.layer.{place}"
        for name in STEM[1:]:
            append(f"{here}.{name}", getattr(layer, name))
        if cast(Any, layer).use_residual:
            blocks.append(Block(start, len(nodes)))
        slots.append(Slot(here, len(nodes)))
    append(f"{ROOT}.conv_1x1", model.get_submodule(f"{ROOT}.conv_1x1"))
    slots.append(Slot(f"{ROOT}.conv_1x1", len(nodes)))
    return Chain(tuple(nodes), tuple(blocks), tuple(slots))

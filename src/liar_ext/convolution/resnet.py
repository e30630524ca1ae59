"""The chain of a ResNet: all blocks; the stem, behind which is a pooling, stays as it is."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from liar_ext.convolution.chain import Block, Chain, Node, Slot, node_of

STAGES = "resnet.encoder.stages"


def chain(model: PreTrainedModel) -> Chain:
    """Of basic and bottleneck layers alike; a slot for each stage."""
    activation = model.config.hidden_act
    nodes: list[Node] = []
    blocks: list[Block] = []
    slots: list[Slot] = []
    for place, stage in enumerate(cast(nn.ModuleList, model.get_submodule(STAGES))):
        path = f"{STAGES}.{place}.layers"
        for at, layer in enumerate(cast(Any, stage).layers):
            start, here = len(nodes), f"{path}.{at}"
            # the last one has its activation behind the sum
            nodes += [
                node_of(f"{here}.layer.{i}", cast(Any, part).convolution, activation)
                for i, part in enumerate(layer.layer)
            ]
            shortcut = None
            if not isinstance(layer.shortcut, nn.Identity):
                shortcut = node_of(f"{here}.shortcut", layer.shortcut.convolution, None)
            blocks.append(Block(start, len(nodes), shortcut))
        slots.append(Slot(path, len(nodes)))
    # a maximum of what the stem's activation lets through
    return Chain(tuple(nodes), tuple(blocks), tuple(slots), entry=activation)

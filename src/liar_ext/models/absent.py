"""Attention or FFN that is not there: what a layer does when all units of a Site are gone.

A layer adds to its input what its attention and its FFN say, or a norm makes of that. One without
units says the bias of its consumer, the same for every token, or nothing; neither is the norm in
front of it needed.

The cache of keys and values is kept by `layer_idx`, and transformers reads how far a sequence is
from its first entry: the layers that have attention get the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError

# a layer's place in its model; the cache of keys and values is kept by it
INDEX = "layer_idx"
# of layers where a config tells no types apart
ONE_TYPE = "full_attention"


@dataclass(frozen=True)
class Block:
    """The part of a layer that a Site is all of, where the sum of both is not normed again.

    Attributes:
        path: of the module that is called with the normed hidden states; norm: of that norm, None
            where it is no other's (parallel attention and FFN behind one norm).
        pair: it gives back its output and attention weights, not the output alone.
    """

    path: str
    norm: str | None
    pair: bool


class Absent(nn.Module):
    """Stands where a block was.

    Args:
        bias: (d,) of its consumer, or None; its tensor keeps its name, `consumer` inside the block.
        weight: (0,) under the name of the consumer's, see `NoNorm`, or None.
    """

    def __init__(
        self,
        consumer: str,
        bias: nn.Parameter | None,
        weight: nn.Parameter | None = None,
        *,
        pair: bool,
    ) -> None:
        super().__init__()
        self._pair = pair
        owner: nn.Module = self
        for name in consumer.split("."):
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_parameter("bias", bias)
        if weight is not None:
            owner.register_parameter("weight", weight)
        self._consumer = consumer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        bias = self.get_submodule(self._consumer).bias
        said = torch.zeros_like(hidden_states)
        if isinstance(bias, Tensor):
            said = said + bias
        return (said, None) if self._pair else said


class NoNorm(nn.Module):
    """Stands where the norm in front of an absent block was.

    Its weight is there and empty: a folder that stock transformers is made to load, because
    `save_pretrained` has written the family's `model_type`, has a tensor that does not fit, and is
    refused. Where nothing but tensors were missing, they would be made up with a warning.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = _misfit(weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def remove(layer: nn.Module, block: Block, consumer: str) -> None:
    """Put an `Absent` in the place of a block, with the bias of its consumer.

    Args:
        consumer: path of the linear in the layer.
    """
    inside = consumer.removeprefix(f"{block.path}.")
    parameters = layer.get_submodule(consumer)._parameters
    bias, weight = parameters.get("bias"), parameters["weight"]
    assert weight is not None
    norm = None if block.norm is None else layer.get_submodule(block.norm)._parameters.get("weight")
    misfit = _misfit(weight) if norm is None else None
    layer.set_submodule(block.path, Absent(inside, bias, misfit, pair=block.pair))
    if block.norm is not None:
        layer.set_submodule(block.norm, nn.Identity() if norm is None else NoNorm(norm))


def _misfit(weight: Tensor) -> nn.Parameter:
    """What fits no place of a stock model."""
    return nn.Parameter(weight.new_empty(0), requires_grad=False)


def is_absent(layer: nn.Module, block: Block | None) -> bool:
    """Whether the layer has this block no more."""
    return block is not None and isinstance(layer.get_submodule(block.path), Absent)


def renumber(layers: Sequence[nn.Module], block: Block, types: Sequence[str] | None) -> None:
    """Give the layers that have attention the first places of the cache, of each type its own.

    Args:
        block: of attention; types: of the attention of each layer, where a config has them.
    Raises:
        InputError: no layer has attention, or none of the type of the first layer, by whose cache
            transformers counts the tokens.
    """
    kinds = list(types or [ONE_TYPE] * len(layers))
    live = [index for index, layer in enumerate(layers) if not is_absent(layer, block)]
    if len(live) == len(layers):
        return
    if not any(kinds[index] == kinds[0] for index in live):
        other = f" of the type of the first layer ({kinds[0]})" if live else ""
        raise InputError(
            f"no layer with attention{other} would be left, by which the tokens of a sequence are "
            "counted; keep one"
        )
    for kind in dict.fromkeys(kinds):
        places = (index for index, own in enumerate(kinds) if own == kind)
        for index in (index for index in live if kinds[index] == kind):
            place = next(places)
            for module in layers[index].modules():
                if isinstance(getattr(module, INDEX, None), int):
                    setattr(module, INDEX, place)

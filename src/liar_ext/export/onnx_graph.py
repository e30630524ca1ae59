"""A model as a function of tensors, with the names and free dimensions that ONNX is given.

Names are those that Optimum and ONNX Runtime's examples use: `past_key_values.0.key` goes in,
`present.0.key` comes out and is the next call's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liar_ext.caches import cache_of, cache_option

PARTS = ("key", "value")
# sizes of the example: neither 0 nor 1, which torch.export takes for constants, nor alike
BATCH, LENGTH, PAST = 2, 3, 5


@dataclass(frozen=True)
class Graph:
    """What is traced.

    Attributes:
        module: called with `inputs` by place; a list of keys and values comes last, if any.
        shapes: free dimensions of each argument, as torch.export takes them.
        names, outputs: of the tensors in order.
        cache: (heads, head width) of keys, then of values, of each layer with attention.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    shapes: tuple[Any, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: tuple[tuple[int, int], ...] = ()


class _Plain(nn.Module):
    """Fields of a model's output, without a cache."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model, self.names, self.outputs = model, tuple(names), tuple(outputs)
        takes = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in takes else {}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, values, strict=True))
        found = self.model(**named, **self.options, return_dict=True)
        return tuple(found[name] for name in self.outputs)


class _Cached(nn.Module):
    """Logits and the cache after these tokens, from the cache before them."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names, self.cache = model, tuple(names), cache_option(model)

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        *tensors, past = values
        # of no config: layers with a sliding window keep all, and the mask leaves out what is old
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        named = dict(zip(self.names, tensors, strict=True))
        found = self.model(**named, **{self.cache: cache}, use_cache=True, return_dict=True)
        kept = [part for layer in cache_of(found).layers for part in (layer.keys, layer.values)]
        return (found.logits, *kept)


def plain_graph(model: PreTrainedModel) -> Graph:
    """An encoder, or a decoder without a cache: what it says of whole sequences."""
    names = ["input_ids", "attention_mask"]
    if (getattr(model.config, "type_vocab_size", None) or 0) > 1:
        names.append("token_type_ids")
    inputs = [_tokens(BATCH, LENGTH), torch.ones(BATCH, LENGTH, dtype=torch.long)]
    inputs += [torch.zeros(BATCH, LENGTH, dtype=torch.long)] * (len(names) - 2)
    with torch.no_grad():
        found = model(**dict(zip(names, inputs, strict=True)), return_dict=True)
    outputs = [name for name, value in found.items() if isinstance(value, Tensor)]
    free = {0: "batch", 1: "length"}
    # arguments by place (*values) are one argument to torch.export
    return Graph(
        _Plain(model, names, outputs).eval(),
        tuple(inputs),
        (tuple(dict(free) for _ in names),),
        tuple(names),
        tuple(outputs),
    )


def cached_graph(model: PreTrainedModel) -> Graph:
    """A decoder that goes on from keys and values; of length 0 for the first tokens."""
    takes = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"] + ["position_ids"] * ("position_ids" in takes)
    cache = cache_shapes(model)
    inputs = feed(cache, names, _tokens(BATCH, LENGTH), PAST, model.dtype)
    free = {
        "input_ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "length"},
    }
    past = [{0: "batch", 2: "past"} for _ in cache]
    of_layers = [f"{layer}.{part}" for layer in range(len(cache) // 2) for part in PARTS]
    return Graph(
        _Cached(model, names).eval(),
        inputs,
        ((*(free[name] for name in names), past),),
        (*names, *(f"past_key_values.{name}" for name in of_layers)),
        ("logits", *(f"present.{name}" for name in of_layers)),
        cache,
    )


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Heads and head width of keys and values in turn, of each layer that has a cache."""
    found = cache_of(model(_tokens(1, 2), use_cache=True, return_dict=True))
    parts = [part for layer in found.layers for part in (layer.keys, layer.values)]
    # a config promises a place for each layer; one without attention leaves the last one empty
    return tuple((part.shape[1], part.shape[3]) for part in parts if part is not None)


def feed(
    cache: Sequence[tuple[int, int]],
    names: Sequence[str],
    tokens: Tensor,
    past: int,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Arguments of a call with `past` tokens of zeros in the cache."""
    batch, length = tokens.shape
    named = {
        "input_ids": tokens,
        "attention_mask": torch.ones(batch, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).expand(batch, -1).contiguous(),
    }
    kept = [torch.zeros(batch, heads, past, width, dtype=dtype) for heads, width in cache]
    return (*(named[name] for name in names), kept)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 7 + 1

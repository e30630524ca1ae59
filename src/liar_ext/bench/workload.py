"""A workload, for one layer: hidden states, the arguments its model gives it, and its cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.caches import cache_option
from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import LayerCall, record_calls
from liar_ext.errors import InputError
from liar_ext.latency import Workload
from liar_ext.models import adapter_for, text_config


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on `meta` random parameters in `dtype`; buffers keep their values and dtypes.

    Matrices keep the variance of what they are given, so that nothing overflows or vanishes: some
    processors are slow where it does.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = torch.randn(parameter.shape, device=device)
                if value.dim() > 1:
                    # (in, out) or (out, in)
                    value *= value.shape[0 if isinstance(part, Conv1D) else -1] ** -0.5
                part._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def calls_of(
    model: PreTrainedModel, work: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[LayerCall]]:
    """Random hidden states (batch, tokens, hidden), and how the model calls each of its layers.

    Args:
        model: on `meta`. What is outside of its layers is made real, with an embedding of one
            token, for no more is needed.
    """
    adapter = adapter_for(model.config)
    backbone, layers = adapter.backbone(model)[1], adapter.layer_list(model)[1]
    assert isinstance(backbone, PreTrainedModel)
    embedding = backbone.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    backbone.set_input_embeddings(nn.Embedding(1, embedding.embedding_dim, device="meta"))
    needed = [layers[0]] if adapter.hands_on else []
    for child in (*_outside(backbone, layers), *needed):
        materialise(child, device, dtype)
    ids = torch.zeros(work.batch, work.tokens, dtype=torch.int64)
    options = adapter.options
    if work.mode == "decode":
        # the model asks it for nothing but its length
        narrow = torch.zeros(work.batch, 1, work.seq_len, 1, device=device, dtype=dtype)
        cache = DynamicCache(config=text_config(model.config))
        for index in range(len(layers)):
            cache.update(narrow, narrow, index)
        options = {"use_cache": True, cache_option(backbone): cache}
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    hidden, calls = record_calls(
        backbone, layers, batch, device, options, adapter.returns, hands_on=adapter.hands_on
    )
    return torch.randn_like(hidden), calls


class _Added(Exception):
    """Keys and values of a layer's new tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class _Asked(DynamicCache):
    """A cache that tells what is added to it, and where the layer is left."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise _Added(key_states, value_states)


def cache_for(
    model: PreTrainedModel,
    index: int,
    layer: nn.Module,
    hidden: Tensor,
    call: LayerCall,
    work: Workload,
) -> DynamicCache:
    """Random keys and values of `seq_len` tokens, as wide as those that a layer adds now.

    Args:
        index: of the layer, which may have fewer heads than the config says.
        hidden: (batch, 1, hidden size) of the next token; call: with a cache to be asked for.
    Raises:
        InputError: the layer keeps no keys and values.
    """
    config = text_config(model.config)
    try:
        own = with_cache(call, _Asked(config=config))
        layer(hidden, *own.args, **own.kwargs)
    except _Added as added:
        cache = DynamicCache(config=config)
        made = []
        for new in (added.keys, added.values):
            shape = (*new.shape[:2], work.seq_len, new.shape[-1])
            made.append(torch.randn(shape, device=new.device).to(new.dtype))
        cache.update(made[0], made[1], index)
        return cache
    raise InputError(
        f"--mode decode: layers of a {config.model_type} model keep no keys and values; use prefill"
    )


def unchanged(cache: DynamicCache) -> DynamicCache:
    """A cache with the same tensors; what is added to it leaves the given one as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def with_cache(call: LayerCall, cache: DynamicCache) -> LayerCall:
    """The call with that cache in the place of its own."""

    def one(value: Any) -> Any:
        return cache if isinstance(value, DynamicCache) else value

    kwargs = {name: one(value) for name, value in call.kwargs.items()}
    return LayerCall(tuple(map(one, call.args)), kwargs)


def _outside(backbone: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The largest modules of a backbone that hold none of its layers."""
    found = []
    for child in backbone.children():
        if child is layers:
            continue
        if any(part is layers for part in child.modules()):
            found += _outside(child, layers)
        else:
            found.append(child)
    return found

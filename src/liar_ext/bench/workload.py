"""A workload, for one layer: hidden states, the arguments its model gives it, and its cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from liar_ext.calibration.batches import Batch
from liar_ext.engine.capture import LayerCall, record_calls
from liar_ext.latency import Workload
from liar_ext.models import Site, adapter_for, text_config


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
                    value *= value.shape[-1] ** -0.5
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
    for child in _outside(backbone, layers):
        materialise(child, device, dtype)
    ids = torch.zeros(work.batch, work.tokens, dtype=torch.int64)
    options = adapter.options
    if work.mode == "decode":
        # the model asks it for nothing but its length
        narrow = torch.zeros(work.batch, 1, work.seq_len, 1, device=device, dtype=dtype)
        cache = DynamicCache(config=text_config(model.config))
        for index in range(len(layers)):
            cache.update(narrow, narrow, index)
        options = {"use_cache": True, "past_key_values": cache}
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    hidden, calls = record_calls(backbone, layers, batch, device, options, adapter.returns)
    return torch.randn_like(hidden), calls


def cache_for(
    model: PreTrainedModel, heads: Site, work: Workload, device: torch.device, dtype: torch.dtype
) -> DynamicCache:
    """Random keys and values of `seq_len` tokens, for the heads that a layer has now."""
    shape = (work.batch, heads.units, work.seq_len, heads.head_dim)
    cache = DynamicCache(config=text_config(model.config))
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    cache.update(keys, values, heads.layer)
    return cache


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

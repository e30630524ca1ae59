"""Granite: LLaMA whose embeddings, scores, additions to the residual stream and logits are each
multiplied by a number of its config."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads
from liar_ext.ops.logits import Shape


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    return {"scale": config.residual_multiplier, "logits": Shape(1 / config.logits_scaling)}


GRANITE = Adapter(
    model_type="granite",
    layers="layers",
    sites=(grouped_heads("attention_bias"), gated_ffn("mlp_bias")),
    decoder=True,
    # of nothing that consumers say where that is multiplied by 0
    residual=lambda config: config.residual_multiplier != 0,
    explicit=explicit_head_dim,
    variant=_variant,
)

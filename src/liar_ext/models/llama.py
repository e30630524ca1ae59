"""LLaMA and the families that share its module names (Mistral, Qwen, Gemma, Granite, SmolLM)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter, plain_head_dim
from liar_ext.models.site import Producer, SiteSpec

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def gated_ffn(
    bias_flag: str | None = None, norm: str | None = "post_attention_layernorm"
) -> SiteSpec:
    """`down_proj(act(gate_proj(x)) * up_proj(x))`; `norm` is the one in front."""
    rows = ("mlp.gate_proj", "mlp.up_proj")
    return SiteSpec(
        kind="ffn",
        consumer="mlp.down_proj",
        producers=tuple(Producer(path) for path in rows),
        config_fields={"intermediate_size": "units"},
        bias_flag=bias_flag,
        bias_filler=rows if bias_flag else (),
        block=Block("mlp", norm, pair=False),
    )


def grouped_heads(bias_flag: str | None = None) -> SiteSpec:
    """Grouped-query attention: a unit is one KV head with the query heads that share it."""
    return SiteSpec(
        kind="heads",
        consumer="self_attn.o_proj",
        producers=tuple(Producer(path) for path in QKV),
        config_fields={"num_attention_heads": "query_heads", "num_key_value_heads": "units"},
        bias_flag=bias_flag,
        bias_filler=QKV if bias_flag else (),
        block=Block("self_attn", "input_layernorm", pair=True),
    )


def explicit_head_dim(config: PretrainedConfig) -> dict[str, Any]:
    return {"head_dim": plain_head_dim(config)}


LLAMA = Adapter(
    model_type="llama",
    layers="layers",
    sites=(grouped_heads("attention_bias"), gated_ffn("mlp_bias")),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
    # LlamaConfig insists on hidden_size % num_attention_heads == 0, MistralConfig does not; with
    # no sliding window the two are the same function with the same weight names.
    alias="mistral",
    note="head counts that do not divide the hidden size are written as `mistral`",
)

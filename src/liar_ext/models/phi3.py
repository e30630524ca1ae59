"""Phi-3: LLaMA with q, k and v in one projection, behind each other, and gate and up in another.

Attention asks the config for its number of query heads in every forward, so layers with a number of
their own get a view of it (`own_config`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim
from liar_ext.models.site import Producer, SiteSpec

FUSED_FFN = SiteSpec(
    kind="ffn",
    consumer="mlp.down_proj",
    producers=tuple(Producer("mlp.gate_up_proj", i, 2) for i in range(2)),
    config_fields={"intermediate_size": "units"},
    block=Block("mlp", "post_attention_layernorm", pair=False),
)


def fused_heads(config: PretrainedConfig) -> SiteSpec:
    """In runs as long as k: some of q, one of k, one of v."""
    queries = config.num_attention_heads // config.num_key_value_heads
    runs = queries + 2
    path = "self_attn.qkv_proj"
    return SiteSpec(
        kind="heads",
        consumer="self_attn.o_proj",
        producers=(
            Producer(path, 0, runs, queries),
            Producer(path, queries, runs),
            Producer(path, queries + 1, runs),
        ),
        attributes=(
            ("self_attn", "num_key_value_heads", "units"),
            ("self_attn", "config.num_attention_heads", "query_heads"),
        ),
        config_fields={"num_attention_heads": "query_heads", "num_key_value_heads": "units"},
        block=Block("self_attn", "input_layernorm", pair=True),
    )


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    return {"sites": (fused_heads(config), FUSED_FFN)}


PHI3 = Adapter(
    model_type="phi3",
    layers="layers",
    sites=(),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
    variant=_variant,
)

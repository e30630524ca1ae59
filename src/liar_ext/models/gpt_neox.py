"""GPT-NeoX and Pythia: q, k and v fused head by head; attention and FFN beside each other
(`use_parallel_residual`) or behind. Its config cannot state a head size, so fewer heads need
`liar_ext.load`."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter, plain_head_dim
from liar_ext.models.site import Producer, SiteSpec

FFN = SiteSpec(
    kind="ffn",
    consumer="mlp.dense_4h_to_h",
    producers=(Producer("mlp.dense_h_to_4h"),),
    config_fields={"intermediate_size": "units"},
    block=Block("mlp", "post_attention_layernorm", pair=False),
)


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    heads = SiteSpec(
        kind="heads",
        consumer="attention.dense",
        producers=(Producer("attention.query_key_value"),),
        bias_flag="attention_bias",
        bias_filler=("attention.query_key_value",),
        columns_per_unit=plain_head_dim(config),
        block=Block("attention", "input_layernorm", pair=True),
    )
    return {"sites": (heads, FFN)}


GPT_NEOX = Adapter(
    model_type="gpt_neox",
    layers="layers",
    sites=(),
    decoder=True,
    residual=lambda config: True,
    variant=_variant,
)

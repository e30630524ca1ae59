"""OPT: ReLU FFN directly in the layer, biases everywhere. Its config cannot state a head size,
so fewer heads need `liar_ext.load`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

HEADS = SiteSpec(
    kind="heads",
    consumer="self_attn.out_proj",
    producers=tuple(Producer(f"self_attn.{p}_proj") for p in "qkv"),
    attributes=(("self_attn", "num_heads", "units"),),
    block=Block("self_attn", "self_attn_layer_norm", pair=True),
)
FFN = SiteSpec(
    kind="ffn",
    consumer="fc2",
    producers=(Producer("fc1"),),
    config_fields={"ffn_dim": "units"},
)


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    # OPT-350m has its norms behind the sums: what they are given must stay
    return {} if config.do_layer_norm_before else {"sites": (replace(HEADS, block=None), FFN)}


OPT = Adapter(
    model_type="opt",
    layers="decoder.layers",
    sites=(HEADS, FFN),
    decoder=True,
    residual=lambda config: config.do_layer_norm_before,
    variant=_variant,
    note="post-norm variants (OPT-350m): no `stream` target",
)

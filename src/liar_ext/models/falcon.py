"""Falcon: q, k and v of a group beside each other, attention and FFN beside each other. Its config
cannot state a head size, so fewer heads need `liar_ext.load`.

Falcon-7B (multi-query: one key and value head for all queries) and variants with ALiBi keep their
heads. Layers give back pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

FFN = SiteSpec(
    kind="ffn",
    consumer="mlp.dense_4h_to_h",
    producers=(Producer("mlp.dense_h_to_4h"),),
    config_fields={"ffn_hidden_size": "units"},
    # attention's output and both norms'
    held=2,
)


def _heads_stay(config: PretrainedConfig) -> str | None:
    if config.alibi:
        return "ALiBi gives each head a slope by its number, from one table for all layers"
    if config.multi_query and not config.new_decoder_architecture:
        return "all queries share one key and value head (multi_query), so they are one unit"
    return None


def _norms(config: PretrainedConfig) -> tuple[str | None, str | None]:
    """In front of attention and of the FFN; None is one for both."""
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return "ln_attn", "ln_mlp"
    if config.new_decoder_architecture or config.parallel_attn:
        return None, None
    return "input_layernorm", "post_attention_layernorm"


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    attention, front = _norms(config)
    ffn = replace(FFN, block=Block("mlp", front, pair=False))
    reason = _heads_stay(config)
    if reason is not None:
        return {
            "sites": (ffn,),
            "refused": {"heads": reason},
            "no_sum": "has attention whose heads are no Site",
        }
    groups = config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads
    heads = SiteSpec(
        kind="heads",
        consumer="self_attention.dense",
        producers=(Producer("self_attention.query_key_value"),),
        attributes=(
            ("self_attention", "num_heads", "query_heads"),
            ("self_attention", "num_kv_heads", "units"),
        ),
        columns_per_unit=config.hidden_size // groups,
        block=Block("self_attention", attention, pair=True),
        # keys and values of all heads
        held=2,
    )
    return {"sites": (heads, ffn)}


FALCON = Adapter(
    model_type="falcon",
    layers="h",
    sites=(),
    decoder=True,
    residual=lambda config: _heads_stay(config) is None,
    variant=_variant,
    returns=2,
    note="multi-query (Falcon-7B) and ALiBi variants: FFN alone, no `stream` target",
)

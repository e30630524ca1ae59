"""BERT and RoBERTa: post-norm encoders with biases everywhere. Their configs cannot state a head
size, so fewer heads need `liar_ext.load`."""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

HEADS = SiteSpec(
    kind="heads",
    consumer="attention.output.dense",
    producers=tuple(Producer(f"attention.self.{p}") for p in ("query", "key", "value")),
    attributes=(
        ("attention.self", "num_attention_heads", "units"),
        ("attention.self", "all_head_size", "columns"),
    ),
)
FFN = SiteSpec(
    kind="ffn",
    consumer="output.dense",
    producers=(Producer("intermediate.dense"),),
    config_fields={"intermediate_size": "units"},
)


def refuse(config: PretrainedConfig) -> str | None:
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder or has cross-attention; only encoders of this family are supported"
    if config.chunk_size_feed_forward:
        return "chunk_size_feed_forward is set; set it to 0 in config.json (same function)"
    return None


BERT = Adapter(
    "bert",
    "encoder.layer",
    (HEADS, FFN),
    decoder=False,
    refuse=refuse,
    note="refused: decoders, cross-attention, `chunk_size_feed_forward`",
)

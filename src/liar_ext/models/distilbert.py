"""DistilBERT: BERT without token types, other names. Fewer heads need `liar_ext.load`."""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec


def _refuse(config: PretrainedConfig) -> str | None:
    if config.chunk_size_feed_forward:
        return "chunk_size_feed_forward is set; set it to 0 in config.json (same function)"
    return None


DISTILBERT = Adapter(
    model_type="distilbert",
    layers="transformer.layer",
    sites=(
        SiteSpec(
            kind="heads",
            consumer="attention.out_lin",
            producers=tuple(Producer(f"attention.{p}_lin") for p in "qkv"),
            attributes=(("attention", "n_heads", "units"), ("attention", "dim", "columns")),
        ),
        SiteSpec(
            kind="ffn",
            consumer="ffn.lin2",
            producers=(Producer("ffn.lin1"),),
            config_fields={"hidden_dim": "units"},
        ),
    ),
    decoder=False,
    head_dim=lambda config: config.dim // config.n_heads,
    refuse=_refuse,
    note="refused: `chunk_size_feed_forward`",
)

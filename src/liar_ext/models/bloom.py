"""BLOOM: ALiBi, so heads stay. The residual is added inside the FFN's module, and its config states
no width of the FFN, so that fewer neurons need `liar_ext.load`. Layers give back pairs."""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec
from liar_ext.models.traced import NO_LIMIT


def _refuse(config: PretrainedConfig) -> str | None:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        return "slow_but_exact is set; set it to false in config.json (same function)"
    return None


BLOOM = Adapter(
    model_type="bloom",
    layers="h",
    sites=(
        SiteSpec(
            kind="ffn",
            consumer="mlp.dense_4h_to_h",
            producers=(Producer("mlp.dense_h_to_4h"),),
        ),
    ),
    decoder=True,
    max_positions=lambda config: NO_LIMIT,
    no_sum="has attention whose heads are no Site",
    refuse=_refuse,
    refused={"heads": "ALiBi gives each head a slope by its number, from one table for all layers"},
    returns=2,
    note="refused: `slow_but_exact`",
)

"""ModernBERT: a pre-norm encoder with q, k, v in one projection, input and gate in another, rotary
positions and windows in most layers. Its config cannot state a head size, so fewer heads need
`liar_ext.load`. The first layer has no norm in front of its attention."""

from __future__ import annotations

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec

MODERNBERT = Adapter(
    model_type="modernbert",
    layers="layers",
    sites=(
        SiteSpec(
            kind="heads",
            consumer="attn.Wo",
            producers=tuple(Producer("attn.Wqkv", i, 3) for i in range(3)),
            bias_flag="attention_bias",
            bias_filler=("attn.Wqkv",),
            block=Block("attn", "attn_norm", pair=True),
        ),
        SiteSpec(
            kind="ffn",
            consumer="mlp.Wo",
            producers=tuple(Producer("mlp.Wi", i, 2) for i in range(2)),
            config_fields={"intermediate_size": "units"},
            bias_flag="mlp_bias",
            bias_filler=("mlp.Wi",),
            block=Block("mlp", "mlp_norm", pair=False),
            # attention's output
            held=1,
        ),
    ),
    decoder=False,
    residual=lambda config: True,
)

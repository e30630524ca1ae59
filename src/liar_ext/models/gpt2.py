"""GPT-2: `Conv1D` weights (in, out) and q, k, v fused in `c_attn`. Its config cannot state a head
size, so fewer heads need `liar_ext.load`."""

from __future__ import annotations

from transformers import PretrainedConfig

from liar_ext.models.absent import Block
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Producer, SiteSpec


def _refuse(config: PretrainedConfig) -> str | None:
    return "it has cross-attention" if config.add_cross_attention else None


GPT2 = Adapter(
    model_type="gpt2",
    layers="h",
    sites=(
        SiteSpec(
            kind="heads",
            consumer="attn.c_proj",
            producers=tuple(Producer("attn.c_attn", i, 3) for i in range(3)),
            attributes=(("attn", "num_heads", "units"), ("attn", "split_size", "columns")),
            block=Block("attn", "ln_1", pair=True),
        ),
        SiteSpec(
            kind="ffn",
            consumer="mlp.c_proj",
            producers=(Producer("mlp.c_fc"),),
            config_fields={"n_inner": "units"},
            block=Block("mlp", "ln_2", pair=False),
            # attention's output
            held=1,
        ),
    ),
    decoder=True,
    residual=lambda config: True,
    refuse=_refuse,
    note="refused: cross-attention",
)

"""Gemma 1 to 3: LLaMA's modules; from Gemma 2 on with norms in front of attention and FFN and
behind them (what they say is normed before it is added), and windows in some layers.

Their norms multiply by 1 + weight. Gemma 2 bounds its scores and logits by a tanh. With
`use_bidirectional_attention` (EmbeddingGemma) they are encoders: no token is last, none is cached.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads
from liar_ext.ops.logits import Shape


def _variant(config: PretrainedConfig) -> dict[str, Any]:
    logits = Shape(bound=getattr(config, "final_logit_softcapping", None))
    if getattr(config, "use_bidirectional_attention", False):
        return {"decoder": False, "takes": {"use_cache": False}, "logits": logits}
    return {"logits": logits}


def _refuse2(config: PretrainedConfig) -> str | None:
    if config.use_bidirectional_attention:
        return (
            "use_bidirectional_attention is set, and Gemma 2's code masks what comes later all the "
            "same, or not, by how attention is implemented"
        )
    return None


ENCODER = "`use_bidirectional_attention`: an encoder"
# their config classes check it, though they state a head size
DIVIDES = "head counts that do not divide the hidden size: `liar_ext.load`"

GEMMA = Adapter(
    model_type="gemma",
    layers="layers",
    sites=(grouped_heads("attention_bias"), gated_ffn()),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
    variant=_variant,
    note=ENCODER,
    neutral_norm=0.0,
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    sites=(grouped_heads("attention_bias"), gated_ffn(norm="pre_feedforward_layernorm")),
    residual=lambda config: False,
    refuse=_refuse2,
    note=f"{DIVIDES}; refused: `use_bidirectional_attention`",
)
# q and k are normalised per head by norms that all heads share, as in Qwen3
GEMMA3 = replace(
    GEMMA2, model_type="gemma3_text", refuse=GEMMA.refuse, note=f"{DIVIDES}; {ENCODER}"
)

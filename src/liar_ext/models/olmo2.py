"""OLMo 2: norms behind attention and FFN and none in front, one over all q and one over all k heads
at once: without a head these would norm the others by another number, so heads stay."""

from __future__ import annotations

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import gated_ffn

OLMO2 = Adapter(
    model_type="olmo2",
    layers="layers",
    sites=(gated_ffn(norm=None),),
    decoder=True,
    refused={"heads": "q_norm and k_norm normalise over all heads at once"},
)

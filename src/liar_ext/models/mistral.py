"""Mistral: LLaMA's modules without any bias flag."""

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads

MISTRAL = Adapter(
    model_type="mistral",
    layers="layers",
    sites=(grouped_heads(), gated_ffn()),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
)

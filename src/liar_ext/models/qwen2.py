"""Qwen2 and Qwen2.5: q, k and v have biases, o_proj and the FFN have none."""

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads

QWEN2 = Adapter(
    model_type="qwen2",
    layers="layers",
    sites=(grouped_heads(), gated_ffn()),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
)

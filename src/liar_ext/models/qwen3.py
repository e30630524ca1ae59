"""Qwen3: q and k are normalised per head (the norms have head_dim weights, shared by all heads,
so removing heads leaves them alone), and head_dim is not hidden_size / heads."""

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads

QWEN3 = Adapter(
    model_type="qwen3",
    layers="layers",
    sites=(grouped_heads("attention_bias"), gated_ffn()),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
)

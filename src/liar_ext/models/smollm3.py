"""SmolLM3: LLaMA in which some layers rotate no positions (`no_rope_layers`)."""

from liar_ext.models.adapter import Adapter
from liar_ext.models.llama import explicit_head_dim, gated_ffn, grouped_heads

SMOLLM3 = Adapter(
    model_type="smollm3",
    layers="layers",
    sites=(grouped_heads("attention_bias"), gated_ffn("mlp_bias")),
    decoder=True,
    residual=lambda config: True,
    explicit=explicit_head_dim,
)

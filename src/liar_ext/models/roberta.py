"""RoBERTa: BERT's modules under another model type."""

from liar_ext.models.adapter import Adapter
from liar_ext.models.bert import FFN, HEADS, refuse

ROBERTA = Adapter(
    model_type="roberta",
    layers="encoder.layer",
    sites=(HEADS, FFN),
    decoder=False,
    # positions start after the padding index
    max_positions=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    refuse=refuse,
)

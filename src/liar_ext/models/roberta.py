"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's modules under other model types."""

from dataclasses import replace

from liar_ext.models.adapter import Adapter
from liar_ext.models.bert import BERT, FFN, HEADS, refuse

ROBERTA = Adapter(
    model_type="roberta",
    layers="encoder.layer",
    sites=(HEADS, FFN),
    decoder=False,
    # positions start after the padding index
    max_positions=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    refuse=refuse,
    note=BERT.note,
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert")

"""ELECTRA: BERT's modules, embeddings of another width."""

from dataclasses import replace

from liar_ext.models.bert import BERT

ELECTRA = replace(BERT, model_type="electra")

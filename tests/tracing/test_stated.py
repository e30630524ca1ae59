"""Config fields that state a width are those that matter, not those that hold the same number."""

from __future__ import annotations

import pytest
import transformers

from liar_ext.tracing import trace

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
BOTH = {"num_attention_heads": "units", "num_key_value_heads": "units"}
GROUPED = {"num_attention_heads": "query_heads", "num_key_value_heads": "units"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.NomicBertConfig(**SMALL, eos_token_id=4), {"num_attention_heads": "units"}),
        (transformers.PhiConfig(**SMALL, eos_token_id=4), BOTH),
        (
            transformers.Starcoder2Config(**SMALL, num_key_value_heads=2, eos_token_id=2),
            GROUPED,
        ),
    ],
    ids=["one count", "two counts", "two of different size"],
)
def test_the_number_of_a_token_is_no_count_of_heads(config, expected):
    fields = {spec.kind: spec.config_fields for spec in trace(config).family.sites}
    assert fields == {"heads": expected, "ffn": {"intermediate_size": "units"}}

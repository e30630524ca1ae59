"""Models that must not be pruned are refused by name, with the list of what can be."""

from __future__ import annotations

import pytest
import transformers
from transformers import AutoConfig

from liar_ext.errors import UnsupportedModelError
from liar_ext.models import ADAPTERS, adapter_for


def config(model_type: str, **values):
    return AutoConfig.for_model(model_type, **values)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (config("mixtral"), "mixture of experts"),
        (config("qwen2_moe"), "mixture of experts"),
        (config("t5"), "encoder-decoder"),
        (config("bart"), "encoder-decoder"),
        (config("bloom"), "not a family this version knows"),
        (config("bert", is_decoder=True), "decoder"),
        (config("bert", add_cross_attention=True), "cross-attention"),
        (config("gpt2", add_cross_attention=True), "cross-attention"),
        (config("roberta", chunk_size_feed_forward=4), "chunk_size_feed_forward"),
        (config("llama", quantization_config={"quant_method": "gptq"}), "quantised"),
        (config("llama", num_kv_shared_layers=2), "share key/value states"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_unsupported_models_are_refused(refused, says):
    with pytest.raises(UnsupportedModelError) as caught:
        adapter_for(refused)
    message = str(caught.value)
    assert says in message
    assert repr(refused.model_type) in message
    assert all(name in message for name in ADAPTERS)
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_serves_its_model_type(name):
    assert adapter_for(config(name)).model_type == name


def test_a_nested_text_config_decides():
    nested = transformers.LlavaConfig(text_config=config("qwen2"))
    assert adapter_for(nested).model_type == "qwen2"
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        adapter_for(transformers.LlavaConfig(text_config=config("mixtral")))

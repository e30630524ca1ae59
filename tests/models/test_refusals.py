"""Models that must not be pruned are refused by name, with the list of what can be."""

from __future__ import annotations

import pytest
import torch
import transformers
from liar_families import FAMILIES, batches_of, write_tokens
from transformers import AutoConfig

import liar_ext
from liar_ext import Recipe
from liar_ext.engine.compression import check_possible
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import ADAPTERS, adapter_for
from liar_ext.planning import plan


def config(model_type: str, **values):
    return AutoConfig.for_model(model_type, **values)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (config("mixtral"), "mixture of experts"),
        (config("qwen2_moe"), "mixture of experts"),
        (config("bart"), "encoder-decoder"),
        (config("mpt"), "not a family this version knows"),
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bloom", "ALiBi gives each head a slope"),
        ("falcon-alibi", "ALiBi gives each head a slope"),
        ("falcon-multi-query", r"all queries share one key and value head \(multi_query\)"),
        ("olmo2", "q_norm and k_norm normalise over all heads at once"),
    ],
)
@pytest.mark.parametrize("target", [("heads",), ("ffn", "heads")], ids=",".join)
def test_heads_that_cannot_go_are_refused_wherever_they_are_asked_for(name, target, says, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "tokens.npy")),
        samples=24,
        seq_len=24,
        target=target,
    )
    batches, model = batches_of(recipe, decoder=True), family.build()
    for call in (
        lambda: liar_ext.prune(model, batches, recipe),
        lambda: liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe),
        lambda: plan(tmp_path / "dense", recipe),
        # where `liar compare` skips a cell
        lambda: check_possible(InMemory(model), recipe, batches, 24 * 24),
    ):
        with pytest.raises(UnsupportedModelError, match=f"--target heads: .* {says}") as caught:
            call()
        assert str(caught.value).endswith("choose from ffn")
    assert not (tmp_path / "out").exists()
    assert all(map(torch.equal, model.state_dict().values(), family.build().state_dict().values()))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma2-mixed", r"this gemma2 model has norms behind its attention and FFN"),
        ("gemma3-mixed", r"this gemma3_text model has norms behind its attention and FFN"),
        ("olmo2", r"this olmo2 model has norms behind its attention and FFN"),
        ("bloom", "this bloom model has attention whose heads are no Site"),
        ("falcon-multi-query", "this falcon model has attention whose heads are no Site"),
    ],
)
def test_a_stream_that_is_no_sum_of_what_sites_say_is_no_target(name, says, tmp_path):
    family = FAMILIES[name]
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "tokens.npy")),
        samples=24,
        seq_len=24,
        target_signal="stream",
    )
    with pytest.raises(InputError, match=f"--target-signal stream: {says}.*choose from local"):
        liar_ext.prune(family.build(), batches_of(recipe, decoder=True), recipe)

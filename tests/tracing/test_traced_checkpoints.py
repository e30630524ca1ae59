"""Checkpoints of families without an adapter: what they hold that no listed family's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import batches_of, outputs, randomise, write_tokens
from transformers import PretrainedConfig, PreTrainedModel

import liar_ext
from liar_ext import InputError, Recipe

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def _dense(folder: Path, auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    model = randomise(auto.from_config(config))
    model.save_pretrained(folder)
    return model


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tokens = str(write_tokens(folder / "tokens.npy", samples=8, length=16))
    base = {"calibration": tokens, "sparsity": 0.5, "samples": 8, "seq_len": 16, "batch_size": 8}
    return Recipe(**{**base, **changes})


def test_a_config_need_not_say_whether_embeddings_are_tied(tmp_path):
    config = transformers.SplinterConfig(**SMALL)
    assert not hasattr(config, "tie_word_embeddings"), "else this shows nothing"
    _dense(tmp_path / "dense", transformers.AutoModel, config)
    report = liar_ext.compress(
        tmp_path / "dense", tmp_path / "small", _recipe(tmp_path), trace=True
    )
    assert [s.units_after for s in report.sites] == [12, 12]
    small = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(small), outputs(liar_ext.load(tmp_path / "small")))


def _apertus() -> PreTrainedModel:
    """Its activation keeps its constants in buffers that are saved."""
    config = transformers.ApertusConfig(**SMALL, rope_parameters={"rope_type": "default"})
    model = randomise(transformers.AutoModelForCausalLM.from_config(config))
    for index, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.beta.fill_(0.25 + index)
        layer.mlp.act_fn.eps.fill_(-torch.inf)
    return model


def test_buffers_of_layers_are_those_of_the_checkpoint(tmp_path):
    model = _apertus()
    model.save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn", "heads"))
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe, trace=True)
    loaded = liar_ext.load(tmp_path / "small")
    buffers = [(float(a.beta), float(a.eps)) for a in (m.mlp.act_fn for m in loaded.model.layers)]
    assert buffers == [(0.25, -torch.inf), (1.25, -torch.inf)]
    expected, got = outputs(model), outputs(loaded)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(stock), got)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_loaded_buffer_keeps_a_dtype_of_its_own(stored, tmp_path):
    model = _apertus().to(stored)
    model.model.layers[0].mlp.act_fn.eps = model.model.layers[0].mlp.act_fn.eps.float()
    model.save_pretrained(tmp_path)
    activation = liar_ext.load(tmp_path, dtype=torch.float16).model.layers[0].mlp.act_fn
    assert activation.beta.dtype == torch.float16
    own = torch.float16 if stored == torch.float32 else torch.float32
    assert activation.eps.dtype == own


def test_a_layout_that_transformers_converts_is_named_and_pruned_in_memory(tmp_path):
    """NomicBERT's projections are stored fused; its modules have them apart."""
    _dense(tmp_path / "dense", transformers.AutoModel, transformers.NomicBertConfig(**SMALL))
    recipe = _recipe(tmp_path)
    with pytest.raises(InputError, match=r"q_proj\.weight is not in .* has .*Wqkv") as caught:
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    assert "then liar_ext.prune and liar_ext.save" in str(caught.value)
    model = transformers.AutoModel.from_pretrained(tmp_path / "dense").eval()
    report = liar_ext.prune(model, batches_of(recipe, decoder=False), recipe, trace=True)
    liar_ext.save(model, tmp_path / "small", report)
    stock = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(stock), outputs(model))
    assert torch.equal(outputs(liar_ext.load(tmp_path / "small")), outputs(model))


def test_layers_may_give_back_lists(tmp_path):
    config = transformers.OpenAIGPTConfig(
        vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    model = _dense(tmp_path / "dense", transformers.AutoModelForCausalLM, config)
    assert isinstance(model.transformer.h[0](torch.zeros(1, 3, 16)), list), (
        "else this shows nothing"
    )
    recipe = _recipe(tmp_path, target=("ffn", "heads"))
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe, trace=True)
    expected, got = outputs(model), outputs(liar_ext.load(tmp_path / "small"))
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())

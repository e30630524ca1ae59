"""Every family: prune, save, load where the report says, same function.

Stock transformers loads what it can express, without a word about missing or unexpected weights;
it refuses the rest, and `liar_ext.load` loads everything.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import (
    FAMILIES,
    Family,
    batches_of,
    outputs,
    probe_tokens,
    randomise,
    tree_hash,
    write_tokens,
)
from liar_stock import stock

import liar_ext
from liar_ext import Recipe
from liar_ext.models import adapter_for, layout

TARGETS = {"ffn": ("ffn",), "heads": ("heads",), "both": ("ffn", "heads")}
PRUNED = [
    (name, target)
    for name, family in FAMILIES.items()
    for target, kinds in TARGETS.items()
    if set(kinds) <= set(family.kinds)
]
# float32 forward passes whose products are summed in another order
TOLERANCE = 1e-5


def _recipe(tmp_path: Path, **changes: Any) -> Recipe:
    base = {
        "calibration": str(write_tokens(tmp_path / "tokens.npy")),
        "sparsity": 0.5,
        "samples": 24,
    }
    return Recipe(**{**base, "seq_len": 24, "batch_size": 8, "ridge": 1e-4, **changes})


def _save(family: Family, folder: Path) -> None:
    family.build().save_pretrained(folder)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(("name", "target"), PRUNED)
def test_prune_save_load_gives_the_same_function(name, target, allocation, tmp_path):
    family = FAMILIES[name]
    source, out = tmp_path / "dense", tmp_path / "small"
    _save(family, source)
    before = tree_hash(source)
    recipe = _recipe(tmp_path, target=TARGETS[target], allocation=allocation)
    report = liar_ext.compress(source, out, recipe)
    assert tree_hash(source) == before, "the source was modified"

    in_memory = family.build()
    other = liar_ext.prune(in_memory, batches_of(recipe, decoder=family.decoder), recipe)
    assert [s.units_after for s in other.sites] == [s.units_after for s in report.sites]
    expected = outputs(in_memory)

    loaded = liar_ext.load(out)
    _close(outputs(loaded), expected)
    if allocation == "uniform":
        sites = adapter_for(in_memory.config).sites
        stated = all(s.config_fields is not None for s in sites if s.kind in TARGETS[target])
        assert report.layout.startswith("stock") == stated
    if report.layout.startswith("stock"):
        _close(outputs(stock(family, out)), expected)
    else:
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            family.auto.from_pretrained(out)
    gone = report.totals["site_parameters_before"] - report.totals["site_parameters_after"]
    assert gone > 0
    assert loaded.num_parameters() == family.build().num_parameters() - gone


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.decoder])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_generation_with_and_without_cache_agree(name, allocation, tmp_path):
    family = FAMILIES[name]
    source, out = tmp_path / "dense", tmp_path / "small"
    _save(family, source)
    liar_ext.compress(source, out, _recipe(tmp_path, target=family.kinds, allocation=allocation))
    model = liar_ext.load(out)
    # longer than the sliding windows of 8
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    ids = probe_tokens(2, 12)
    with_cache = model.generate(ids, use_cache=True, **options)
    without = model.generate(ids, use_cache=False, **options)
    assert with_cache.shape == (2, 28)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("bias", ["auto", "always"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saving_a_loaded_model_again_keeps_the_function(name, allocation, bias, tmp_path):
    family = FAMILIES[name]
    _save(family, tmp_path / "dense")
    recipe = _recipe(tmp_path, target=family.kinds, allocation=allocation, bias=bias)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    model = liar_ext.load(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")
    _close(outputs(liar_ext.load(tmp_path / "again")), outputs(model))
    if report.layout == "liar_ext":
        # the class wrote its own model_type; the shapes must still stop stock transformers
        with pytest.raises((ValueError, RuntimeError)):
            family.auto.from_pretrained(tmp_path / "again")
    else:
        _close(outputs(stock(family, tmp_path / "again")), outputs(model))


@pytest.mark.parametrize("name", ["llama-tied", "llama-head-dim", "qwen3", "opt", "bert"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_model_pruned_in_memory_saves_as_compress_does(name, target, tmp_path):
    family = FAMILIES[name]
    _save(family, tmp_path / "dense")
    recipe = _recipe(tmp_path, target=TARGETS[target])
    liar_ext.compress(tmp_path / "dense", tmp_path / "streamed", recipe)
    model = family.build()
    report = liar_ext.prune(model, batches_of(recipe, decoder=family.decoder), recipe)
    liar_ext.save(model, tmp_path / "saved", report)
    loaded = liar_ext.load(tmp_path / "saved")
    _close(outputs(loaded), outputs(model))
    _close(outputs(loaded), outputs(liar_ext.load(tmp_path / "streamed")))


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("llama-mha", "stock"),
        ("llava", "stock"),
        ("mistral-gqa", "liar_ext"),
        ("qwen2", "liar_ext"),
        ("qwen3", "liar_ext"),
    ],
)
def test_added_biases_reach_whoever_loads(name, loader, tmp_path):
    family = FAMILIES[name]
    _save(family, tmp_path / "dense")
    recipe = _recipe(tmp_path, target=family.kinds, bias="always")
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert report.layout == loader
    assert all(site.bias_added for site in report.sites)
    model = family.build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    loaded = liar_ext.load(tmp_path / "small")
    _close(outputs(loaded), outputs(model))
    biases = [
        p for n, p in loaded.named_parameters() if n.endswith(("down_proj.bias", "o_proj.bias"))
    ]
    assert len(biases) == 4
    assert all(bool(b.any()) for b in biases)
    if loader == "stock":
        _close(outputs(stock(family, tmp_path / "small")), outputs(model))


def test_layers_outside_the_range_stay_dense_and_get_their_biases(tmp_path):
    family = FAMILIES["llama-mha"]
    _save(family, tmp_path / "dense")
    recipe = _recipe(tmp_path, layers=(1, 2), bias="always", sparsity=0.25)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert [site.layer for site in report.sites] == [1]
    model = liar_ext.load(tmp_path / "small")
    assert layout.read(model) == [{"heads": 4, "ffn": 48}, {"heads": 4, "ffn": 36}]
    first = model.model.layers[0].mlp
    assert torch.equal(first.gate_proj.weight, family.build().model.layers[0].mlp.gate_proj.weight)
    assert not first.down_proj.bias.any()


def test_a_head_count_that_llama_rejects_is_written_as_mistral(tmp_path):
    family = FAMILIES["llama-mha"]
    _save(family, tmp_path / "dense")
    # 3 of 4 heads: 32 is no multiple of 3
    recipe = _recipe(tmp_path, target=("heads",), sparsity=0.25)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert report.layout == "stock (as mistral)"
    model = family.build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    loaded = stock(family, tmp_path / "small")
    assert type(loaded).__name__ == "MistralForCausalLM"
    _close(outputs(loaded), outputs(model))
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))


def test_biases_keep_a_model_from_the_mistral_alias(tmp_path):
    """Mistral has none: stock transformers would drop them with a warning."""
    family = FAMILIES["llama-gqa-biases"]
    _save(family, tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("heads",), sparsity=0.25)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert report.layout == "liar_ext"
    model = family.build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))


def test_the_mistral_alias_states_what_llama_left_to_its_defaults(tmp_path):
    """`config.json` written by hand: the families' defaults differ."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, eos_token_id=None
    )
    randomise(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    stated = json.loads(path.read_text())
    kept = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    path.write_text(json.dumps({name: stated[name] for name in kept}))
    recipe = _recipe(tmp_path, target=("heads",), sparsity=0.25)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert report.layout == "stock (as mistral)"
    model = stock(FAMILIES["llama-mha"], tmp_path / "small")
    _close(outputs(model), outputs(liar_ext.load(tmp_path / "small")))
    assert model.config.max_position_embeddings == config.max_position_embeddings
    assert model.config.intermediate_size == config.intermediate_size
    assert model.config.sliding_window is None


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama-mha", "LlamaModel"),
        ("qwen3-mixed", "Qwen3Model"),
        ("opt", "OPTModel"),
        ("gpt2", "GPT2Model"),
        ("distilbert", "DistilBertModel"),
        ("llama-mha", "LlamaForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("target", ["ffn", "heads"])
def test_the_head_of_a_model_does_not_matter(name, architecture, target, tmp_path):
    config = FAMILIES[name].build().config
    config.architectures, config.pad_token_id = [architecture], 0
    randomise(getattr(transformers, architecture)(config)).save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=(target,))
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    model = liar_ext.load(tmp_path / "small")
    assert type(model).__name__ == architecture
    if report.layout == "stock":
        family = replace(FAMILIES[name], auto=type(model))
        _close(outputs(stock(family, tmp_path / "small")), outputs(model))


def test_bf16_checkpoints_stay_bf16(tmp_path):
    family = FAMILIES["llama-tied"]
    family.build().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", _recipe(tmp_path, bias="always"))
    model = liar_ext.load(tmp_path / "small")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    liar_ext.compress(tmp_path / "dense", tmp_path / "wide", _recipe(tmp_path, dtype="float32"))
    assert {p.dtype for p in liar_ext.load(tmp_path / "wide").parameters()} == {torch.float32}


def test_grouped_query_attention_loses_whole_groups(tmp_path):
    family = FAMILIES["qwen3"]
    _save(family, tmp_path / "dense")
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", _recipe(tmp_path, target=("heads",)))
    config = liar_ext.load(tmp_path / "small").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 12)

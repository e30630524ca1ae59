"""What single families need beyond the round trips that all have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import FAMILIES, batches_of, outputs, probe_tokens, randomise, write_tokens
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.calibration import Batch
from liar_ext.models import adapter_for
from liar_ext.models.own_config import OwnConfig
from liar_ext.ops.logits import logits

PHI3 = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "architectures": ["Phi3ForCausalLM"],
}


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tokens = str(write_tokens(folder / "tokens.npy"))
    base = {"calibration": tokens, "sparsity": 0.5, "samples": 24, "seq_len": 24}
    return Recipe(**{**base, **changes})


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float(expected.std()) > 1e-3
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


# -- Phi-3: its attention counts heads by the config ------------------------------------------


def _phi3_of_own_widths(folder: Path) -> Any:
    FAMILIES["phi3"].build().save_pretrained(folder / "dense")
    recipe = _recipe(folder, target=("heads",), layers=(1, 2))
    liar_ext.compress(folder / "dense", folder / "small", recipe)
    return liar_ext.load(folder / "small")


def test_each_layer_counts_its_own_heads_and_the_config_stays_the_models(tmp_path):
    model = _phi3_of_own_widths(tmp_path)
    dense, pruned = (layer.self_attn for layer in model.model.layers)
    assert isinstance(pruned.config, OwnConfig)
    counted = [own.num_attention_heads for own in (model.config, dense.config, pruned.config)]
    assert counted == [8, 8, 4]
    assert pruned.config.sliding_window == model.config.sliding_window == 8
    # what is decided for the model is decided for all layers, whichever is asked
    expected = outputs(model)
    model.set_attn_implementation("eager")
    assert pruned.config._attn_implementation == "eager"
    _close(outputs(model), expected)
    pruned.config.sliding_window = 4
    assert model.config.sliding_window == 4


def test_a_copy_of_the_model_has_its_own_config(tmp_path):
    model = _phi3_of_own_widths(tmp_path)
    twin = copy.deepcopy(model)
    own = twin.model.layers[1].self_attn.config
    assert own.num_attention_heads == 4
    twin.config.sliding_window = 2
    assert own.sliding_window == 2
    assert model.model.layers[1].self_attn.config.sliding_window == 8
    with pytest.raises(AttributeError):
        _ = own.nothing_of_this_name


def test_head_sizes_of_a_long_rope_are_no_longer_what_a_config_can_say(tmp_path):
    """Its factors are as many as hidden size / heads says; the model itself is the same."""
    config = transformers.Phi3Config(
        **PHI3,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0, 1.1],
            "long_factor": [2.0, 3.0],
        },
    )
    randomise(transformers.Phi3ForCausalLM(config)).save_pretrained(tmp_path / "dense")
    for target, layout in ((("heads",), "liar_ext"), (("ffn",), "stock")):
        recipe, out = _recipe(tmp_path, target=target), tmp_path / target[0]
        assert liar_ext.compress(tmp_path / "dense", out, recipe).layout == layout
        model = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "dense").eval()
        liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
        # below and beyond the length where the factors change
        for length in (24, 60):
            ids = probe_tokens(2, length)
            _close(outputs(liar_ext.load(out), ids), outputs(model, ids))


def test_one_key_and_value_head_is_one_unit(tmp_path):
    config = transformers.Phi3Config(**PHI3 | {"num_key_value_heads": 1})
    model = randomise(transformers.Phi3ForCausalLM(config))
    recipe = _recipe(tmp_path, target=("heads",))
    with pytest.raises(InputError, match="every targeted Site has a single unit"):
        liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    recipe = _recipe(tmp_path, target=("ffn", "heads"))
    report = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    assert [(s.kind, s.units_after) for s in report.sites] == [("heads", 1), ("ffn", 12)] * 2


# -- logits that are more than the output embedding -------------------------------------------


@pytest.mark.parametrize("name", ["gemma2-mixed", "gemma3-mixed", "granite", "llama-tied"])
def test_the_head_of_an_adapter_makes_the_models_logits(name):
    model = FAMILIES[name].build()
    adapter = adapter_for(model.config)
    ids = probe_tokens()
    with torch.no_grad():
        states = adapter.backbone(model)[1](input_ids=ids).last_hidden_state
        found = logits(adapter.head(model), states.flatten(0, 1))
    _close(found, outputs(model, ids).flatten(0, 1), 1e-6)


@pytest.mark.parametrize("name", ["gemma2-mixed", "granite"])
@pytest.mark.parametrize("method", ["fisher", "policy", "spdy"])
def test_what_asks_for_a_loss_works_where_logits_are_shaped(name, method, tmp_path):
    changes: dict[str, Any] = {
        "fisher": {"criterion": "fisher", "allocation": "global"},
        "policy": {"criterion": "policy", "policy_steps": 2},
        "spdy": {"allocation": "spdy", "search_evaluations": 4, "search_samples": 8},
    }[method]
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, **changes)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    model = family.build()
    other = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    assert [s.units_after for s in report.sites] == [s.units_after for s in other.sites]
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))


# -- Gemma: its config checks that heads divide the hidden size, though it has a head size -------


@pytest.mark.parametrize("name", ["gemma2-mixed", "gemma3-mixed"])
def test_a_head_count_that_a_config_rejects_needs_this_package(name, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    # 6 of 8 heads: 32 is no multiple
    recipe = _recipe(tmp_path, target=("heads",), sparsity=0.25)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert [(s.units_after, s.units_before) for s in report.sites] == [(3, 4)] * 2
    assert report.layout == "liar_ext"
    model = family.build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))
    with pytest.raises((ValueError, KeyError)):
        family.auto.from_pretrained(tmp_path / "small")


# -- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_norm_that_scales_by_nothing_has_the_weight_that_the_adapter_says(name):
    """As transformers makes it: 0 where the norm adds 1 to it."""
    known = FAMILIES[name].build()
    model = type(known)(known.config)
    adapter = adapter_for(model.config)
    norms = [
        weight.detach()
        for path, weight in adapter.layer_list(model)[1].named_parameters()
        if weight.dim() == 1 and path.endswith("weight")
    ]
    assert norms
    assert {float(value) for weight in norms for value in weight} == {adapter.neutral_norm}


# -- encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["modernbert-mixed", "electra", "xlm-roberta"])
@pytest.mark.parametrize("target", [("ffn",), ("ffn", "heads")], ids=",".join)
def test_padding_does_not_count(name, target, tmp_path):
    """A padded batch is its texts one by one, also where attention has windows."""
    recipe = _recipe(tmp_path, target=target, ridge=1e-2)
    generator = torch.Generator().manual_seed(5)
    padded, alone = [], []
    for _ in range(10):
        lengths = torch.randint(6, 25, (4,), generator=generator).tolist()
        ids = torch.randint(3, 96, (4, max(lengths)), generator=generator)
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        padded.append(Batch(torch.where(mask, ids, 1), mask))
        alone += [
            Batch(row[None, :length], torch.ones(1, length, dtype=torch.bool))
            for row, length in zip(ids, lengths, strict=True)
        ]
    found = []
    for batches in (padded, alone):
        model = FAMILIES[name].build()
        liar_ext.prune(model, tuple(batches), recipe)
        found.append(outputs(model))
    _close(found[0], found[1], 1e-3)


def test_an_encoder_of_gemmas_class_is_one(tmp_path):
    """EmbeddingGemma: every token sees every other, within half a window, and none is cached."""
    config = FAMILIES["gemma3-mixed"].build().config
    data = config.to_dict() | {
        "use_bidirectional_attention": True,
        "architectures": ["Gemma3TextModel"],
    }
    config = transformers.Gemma3TextConfig(**data)
    adapter = adapter_for(config)
    assert not adapter.decoder
    assert adapter.options == {"use_cache": False}
    source = randomise(transformers.Gemma3TextModel(config))
    source.save_pretrained(tmp_path / "dense")
    for allocation in ("uniform", "global"):
        out = tmp_path / allocation
        recipe = _recipe(tmp_path, target=("ffn", "heads"), allocation=allocation)
        liar_ext.compress(tmp_path / "dense", out, recipe)
        model = transformers.Gemma3TextModel.from_pretrained(tmp_path / "dense").eval()
        liar_ext.prune(model, batches_of(recipe, decoder=False), recipe)
        _close(outputs(liar_ext.load(out)), outputs(model))


# -- checkpoints as they are on the hub ---------------------------------------------------------


def test_buffers_that_old_checkpoints_keep_in_every_layer_are_left_out(tmp_path):
    """Pythia's: causal masks, and the rotary table that the model has once now."""
    family = FAMILIES["gpt_neox"]
    family.build().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        front = f"gpt_neox.layers.{layer}.attention"
        tensors |= {
            f"{front}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
            f"{front}.masked_bias": torch.tensor(-1e9),
            f"{front}.rotary_emb.inv_freq": torch.ones(1),
        }
    save_file(tensors, path, metadata={"format": "pt"})
    recipe = _recipe(tmp_path, target=("ffn", "heads"), layers=(0, 1))
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert not any("inv_freq" in line for line in report.warnings)
    model = family.build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))
    kept = load_file(tmp_path / "small" / "model.safetensors")
    assert not any("inv_freq" in name or "masked_bias" in name for name in kept)
    # what is no such buffer is still no part of this model
    del tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"]
    tensors["gpt_neox.layers.0.attention.other.inv_freq"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"attention.other.inv_freq .*not in GPTNeoX"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "other", recipe)

"""Encoder-decoders: both stacks are one chain of layers, with the tokens of both on their way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from liar_families import (
    PAIRED,
    Family,
    outputs,
    pairs_of,
    probe_tokens,
    randomise,
    tree_hash,
    write_tokens,
)
from liar_stock import stock
from transformers import T5Config, T5ForConditionalGeneration

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.calibration import Batch
from liar_ext.engine.capture import layer_output
from liar_ext.engine.passage import passage_of
from liar_ext.errors import UnsupportedModelError
from liar_ext.models import adapter_for, layout
from liar_ext.ops.logits import logits

HOST = torch.device("cpu")
# float32 forward passes whose products are summed in another order
TOLERANCE = 1e-5


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tokens = str(write_tokens(folder / "tokens.npy", samples=48, length=24))
    base = {"calibration": tokens, "sparsity": 0.5, "samples": 48, "seq_len": 12, "batch_size": 8}
    return Recipe(**{**base, "ridge": 1e-4, **changes})


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _plain(family: Family, folder: Path) -> Any:
    return family.auto.from_pretrained(folder)


def _ragged() -> tuple[Batch, Batch]:
    """What both stacks read, with padding in both."""
    source, target = probe_tokens(3, 11), probe_tokens(4, 7)[1:]
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (source, target)]
    masks[0][1, 8:] = False
    masks[1][2, 4:] = False
    return Batch(source, masks[0]), Batch(target, masks[1])


@pytest.mark.parametrize("name", PAIRED)
@torch.no_grad()
def test_layer_by_layer_is_what_the_model_does(name):
    model = PAIRED[name].build()
    adapter = adapter_for(model.config)
    source, target = _ragged()
    batch, passage = Batch.of_pair(source, target), passage_of(model, adapter)
    states, calls = passage.enter(batch, HOST)
    for layer, call in zip(passage.layers, calls, strict=True):
        states = layer_output(layer, states, call)
    last = passage.leave(batch, HOST, states)
    found = logits(adapter.head(model), last.flatten(0, 1)).view(*last.shape[:2], -1)
    expected = model(
        input_ids=source.input_ids,
        attention_mask=source.attention_mask,
        decoder_input_ids=target.input_ids,
        decoder_attention_mask=target.attention_mask,
    ).logits
    _close(found[target.attention_mask], expected[target.attention_mask])


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", PAIRED)
def test_prune_save_load_gives_the_same_function(name, allocation, tmp_path):
    family = PAIRED[name]
    dense = family.build()
    dense.save_pretrained(tmp_path / "dense")
    before = tree_hash(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), allocation=allocation)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert tree_hash(tmp_path / "dense") == before
    assert [site.layer for site in report.sites] == [0, 1, 2, 3, 4]

    in_memory = family.build()
    other = liar_ext.prune(in_memory, pairs_of(recipe), recipe)
    assert [s.units_after for s in other.sites] == [s.units_after for s in report.sites]
    expected = outputs(in_memory)
    loaded = liar_ext.load(tmp_path / "small")
    _close(outputs(loaded), expected)
    assert report.layout == ("stock" if allocation == "uniform" else "liar_ext")
    if report.layout == "stock":
        # of one whose embeddings differ transformers says so, as it does of the dense model
        quiet = name != "t5-untied"
        found = stock(family, tmp_path / "small") if quiet else _plain(family, tmp_path / "small")
        _close(outputs(found), expected)
    else:
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            family.auto.from_pretrained(tmp_path / "small")
    gone = report.totals["site_parameters_before"] - report.totals["site_parameters_after"]
    assert gone > 0
    assert loaded.num_parameters() == dense.num_parameters() - gone
    assert report.totals["parameters_after"] == report.totals["parameters_before"] - gone
    # and again, by transformers alone
    loaded.save_pretrained(tmp_path / "again")
    _close(outputs(liar_ext.load(tmp_path / "again")), expected)


@pytest.mark.parametrize("name", ["t5", "t5-untied"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_generation_with_and_without_cache_agree(name, allocation, tmp_path):
    PAIRED[name].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), allocation=allocation)
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    model = liar_ext.load(tmp_path / "small")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = [model.generate(probe_tokens(2, 12), use_cache=own, **options) for own in (True, False)]
    assert found[0].shape == (2, 13)
    assert torch.equal(*found)


def _interpolated(model: T5ForConditionalGeneration, batches: list[Batch], keep: int) -> None:
    """The same repair by plain forwards of transformers, float64: layer after layer the last `keep`
    neurons stay, and `lstsq` fits what the consumer made of all of them."""
    blocks = [*model.encoder.block, *model.decoder.block]
    for place, block in enumerate(blocks):
        own = 0 if place < len(model.encoder.block) else 1
        ffn = block.layer[-1].DenseReluDense
        heard: list[torch.Tensor] = []
        hook = ffn.wo.register_forward_pre_hook(lambda _, args, heard=heard: heard.append(args[0]))
        for batch in batches:
            source, target = batch.parts
            model(
                input_ids=source.input_ids,
                attention_mask=source.attention_mask,
                decoder_input_ids=target.input_ids,
                decoder_attention_mask=target.attention_mask,
            )
        hook.remove()
        masks = [batch.parts[own].attention_mask for batch in batches]
        x = torch.cat([rows[mask] for rows, mask in zip(heard, masks, strict=True)])
        kept = torch.arange(x.shape[1])[-keep:]
        # without biases: the best linear map of the kept columns
        fitted = torch.linalg.lstsq(x[:, kept], x @ ffn.wo.weight.T).solution
        ffn.wo.weight = torch.nn.Parameter(fitted.T)
        for name in ("wi", "wi_0", "wi_1"):
            if hasattr(ffn, name):
                linear = getattr(ffn, name)
                linear.weight = torch.nn.Parameter(linear.weight[kept])


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
@torch.no_grad()
def test_the_decoder_is_repaired_for_what_the_pruned_encoder_says(name, tmp_path):
    """Against plain forwards, pruned layer by layer: both stacks, cross-attention, padding."""
    generator = torch.Generator().manual_seed(3)
    source, target = _ragged()
    many = [
        Batch.of_pair(
            *(
                Batch(torch.randint(3, 96, own.shape, generator=generator), own)
                for own in (source.attention_mask, target.attention_mask)
            )
        )
        for _ in range(24)
    ]
    # columns whose norm grows with their number: the criterion keeps the last
    models = [PAIRED[name].build().double() for _ in range(2)]
    for model in models:
        for block in (*model.encoder.block, *model.decoder.block):
            ffn = block.layer[-1].DenseReluDense
            scale = 1.02 ** torch.arange(48, dtype=torch.float64)
            unit = ffn.wo.weight / ffn.wo.weight.norm(dim=0)
            ffn.wo.weight = torch.nn.Parameter(unit * scale)
    recipe = Recipe(
        sparsity=0.5, target=("ffn",), ridge=1e-12, criterion="magnitude", bias="never", round_to=1
    )
    liar_ext.prune(models[0], many, recipe)
    _interpolated(models[1], many, 24)
    _close(outputs(models[0]), outputs(models[1]))


def test_position_biases_are_those_that_the_first_layer_makes():
    """All layers are called with them; a stub that handed on nothing would have zeros."""
    model = PAIRED["t5"].build()
    batch = Batch.of_pair(*_ragged())
    _, calls = passage_of(model, adapter_for(model.config)).enter(batch, HOST)
    attention = model.encoder.block[0].layer[0].SelfAttention
    given = calls[1].args[1]
    assert torch.equal(given, attention.compute_bias(11, 11))
    assert float(given.detach().abs().max()) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": ("heads",)}, "the heads of this t5 model cannot be pruned: one table of"),
        ({"target_signal": "stream"}, "attention whose heads are no Site"),
        ({"drop_layers": (1,)}, "two stacks of layers"),
        ({"depth": "reverse", "drop": 1}, "two stacks of layers"),
    ],
    ids=["heads", "stream", "drop-layers", "depth"],
)
def test_what_cannot_be_done_is_refused_by_name(changes, message, tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, **{"target": ("ffn",), **changes})
    with pytest.raises((InputError, UnsupportedModelError), match=message):
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert not (tmp_path / "small").exists()


def test_a_batch_without_what_the_decoder_reads_is_refused():
    model = PAIRED["t5"].build()
    recipe = Recipe(sparsity=0.5, target=("ffn",))
    with pytest.raises(InputError, match="no decoder_input_ids, which t5 needs"):
        liar_ext.prune(model, [probe_tokens(8, 24)], recipe)


def test_a_mapping_of_tensors_is_a_pair():
    models = [PAIRED["t5"].build() for _ in range(2)]
    source, target = probe_tokens(8, 24), probe_tokens(8, 16)
    recipe = Recipe(sparsity=0.5, target=("ffn",))
    mapping = {"input_ids": source, "decoder_input_ids": target}
    whole = [Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in (source, target)]
    liar_ext.prune(models[0], [mapping], recipe)
    liar_ext.prune(models[1], [Batch.of_pair(*whole)], recipe)
    assert torch.equal(outputs(models[0]), outputs(models[1]))


def test_tied_tensors_that_differ_in_the_files_are_not_tied(tmp_path):
    dense = PAIRED["t5-untied"].build()
    dense.save_pretrained(tmp_path / "dense")
    loaded = liar_ext.load(tmp_path / "dense")
    assert torch.equal(loaded.lm_head.weight, dense.lm_head.weight)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert loaded.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("criterion", ["snip", "fisher", "policy"])
@pytest.mark.parametrize("allocation", ["uniform", "evolution"])
def test_losses_of_the_decoder_steer(criterion, allocation, tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(
        tmp_path, target=("ffn",), criterion=criterion, allocation=allocation, gradient_samples=8
    )
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert all(site.units_after < 48 for site in report.sites) or allocation != "uniform"
    assert json.loads((tmp_path / "small" / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]


def test_layers_are_counted_through_both_stacks(tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), layers=(2, 4))
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert [site.name for site in report.sites] == [
        "encoder.block.2.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    ]
    assert layout.read(liar_ext.load(tmp_path / "small")) == [
        {"ffn": width} for width in (48, 48, 24, 24, 48)
    ]


def test_other_encoder_decoders_stay_refused():
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    config.model_type = "longt5"
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        adapter_for(config)
    assert randomise(T5ForConditionalGeneration(T5Config(**config.to_dict()))) is not None

"""Encoder-decoders: both stacks are one chain of layers, with the tokens of both on their way."""

from __future__ import annotations

import json
from dataclasses import replace
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
from liar_kill import Work, compress, differences, resume
from liar_stock import stock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import liar_ext
from liar_ext import InputError, Recipe, planning
from liar_ext.calibration import Batch
from liar_ext.cli import main
from liar_ext.depth.drop import drop_layers
from liar_ext.depth.surgery import layer_list
from liar_ext.engine.calls import layer_output
from liar_ext.engine.execution import Execution
from liar_ext.engine.passage import passage_of
from liar_ext.errors import UnsupportedModelError
from liar_ext.export.servers import check
from liar_ext.models import adapter_for, layout
from liar_ext.ops.logits import logits

HOST = torch.device("cpu")
WORDS = [f"w{number}" for number in range(80)]
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


@pytest.mark.parametrize("name", ["t5", "t5-untied"])
@pytest.mark.parametrize("changes", [{}, {"allocation": "global"}, {"round_to": 16}])
def test_the_plan_is_what_compress_does(name, changes, tmp_path):
    PAIRED[name].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), **changes)
    rates = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}
    found = planning.plan(tmp_path / "dense", recipe, rates=rates)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    if found["exact"]:
        for what in ("parameters", "bytes"):
            now = {when: report.totals[f"{what}_{when}"] for when in ("before", "after")}
            assert found[what] == now
        assert found["loader"]["layout"] == report.layout
    assert found["calibration"]["tokens"] == report.calibration["tokens"] == 2 * 48 * 12
    assert found["calibration"]["shares"] == (0.5, 0.5)
    assert [(s["name"], s["columns_before"]) for s in found["sites"]] == [
        (site.name, 48) for site in report.sites
    ]


def test_forwards_are_counted_on_the_tokens_that_each_stack_reads(tmp_path):
    """Against the rows that the linears of the layers are given in plain forwards."""
    model = PAIRED["t5"].build()
    model.save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",))
    flops = 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * args[0][..., 0].numel() * module.weight.numel()

    for stack in (model.encoder, model.decoder):
        for module in stack.block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(count)
    with torch.no_grad():
        for batch in pairs_of(recipe):
            source, target = batch.parts
            model(input_ids=source.input_ids, decoder_input_ids=target.input_ids, use_cache=False)
    rates = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}
    found = planning.plan(tmp_path / "dense", recipe, rates=rates)["flops"]
    assert found["forward"] == flops
    # 5 Sites of 48 columns, of half of the tokens each
    assert found["gram"] == 5 * 48**2 * (48 * 12)


@pytest.mark.parametrize("samples", [3, 48])
def test_tokens_are_counted_for_each_stack(samples, tmp_path):
    """36 tokens of each stack are fewer than 48 columns, though 72 of both are not."""
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), samples=samples)
    found = planning.plan(tmp_path / "dense", recipe, rates=None)["calibration"]
    if samples == 48:
        assert "only" not in str(found["problem"])
        return
    assert found["problem"].startswith("36 calibration tokens for 48 columns")
    with pytest.raises(InputError, match="36 calibration tokens for 48 columns"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)


@pytest.mark.parametrize(
    ("changes", "place", "kills"),
    [
        ({}, "device", [("journal written", 2), ("site half pruned", 2)]),
        (
            {"target_signal": "dense"},
            "disk",
            [("journal written", 1), ("hidden states half written", 3), ("journal written", 2)],
        ),
        ({"allocation": "evolution"}, "disk", [("answers written", 1), ("journal written", 2)]),
        ({"statistics": "oneshot"}, "disk", [("layer being written", 4)]),
    ],
    ids=["sequential", "dense", "search", "oneshot"],
)
def test_killed_and_resumed_in_either_stack_the_result_is_the_same(changes, place, kills, tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    searches = {"search_samples": 4, "search_evaluations": 8}
    recipe = _recipe(tmp_path, target=("ffn",), **searches, **changes)
    execution = Execution(hidden_states=place, journal_seconds=0)
    work = Work(tmp_path / "dense", tmp_path / "out", recipe, execution)
    assert compress(replace(work, out=tmp_path / "whole")).done
    for point, nth in kills:
        assert compress(work, at=point, nth=nth).killed, f"{point} was not reached {nth} times"
        work = work.resumed()
    resume(work)
    assert differences(tmp_path / "whole", work.out) == []


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("signal", ["local", "dense"])
def test_where_hidden_states_wait_makes_no_difference(signal, place, tmp_path):
    PAIRED["t5-gated"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), target_signal=signal)
    for name, where in (("one", "device"), ("other", place)):
        execution = Execution(hidden_states=where)
        liar_ext.compress(tmp_path / "dense", tmp_path / name, recipe, execution=execution)
    found = [outputs(liar_ext.load(tmp_path / name)) for name in ("one", "other")]
    assert torch.equal(*found)


@torch.no_grad()
def test_with_a_dense_target_the_decoder_is_nearer_to_the_dense_one(tmp_path):
    """On the calibration tokens: drift of the encoder reaches the decoder by cross-attention."""
    dense = PAIRED["t5"].build()
    errors = {}
    for signal in ("local", "dense"):
        model = PAIRED["t5"].build()
        recipe = _recipe(tmp_path, target=("ffn",), target_signal=signal)
        batches = pairs_of(recipe)
        liar_ext.prune(model, batches, recipe)
        above = below = 0.0
        for batch in batches:
            source, target = batch.parts
            inputs = {"input_ids": source.input_ids, "decoder_input_ids": target.input_ids}
            said, wanted = (
                own(**inputs, output_hidden_states=True).decoder_hidden_states[-1].double()
                for own in (model, dense)
            )
            above += float((said - wanted).square().sum())
            below += float(wanted.square().sum())
        errors[signal] = above / below
    assert errors["dense"] < errors["local"] < 1


def test_what_works_on_one_stack_says_so(tmp_path):
    """Whole layers: by name, before anything is written."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    model = PAIRED["t5"].build()
    model.save_pretrained(dense)
    with pytest.raises(UnsupportedModelError, match="two stacks of layers"):
        drop_layers(dense, out, [1])
    with pytest.raises(UnsupportedModelError, match="two stacks of layers"):
        layer_list(model)
    assert not out.exists()


def test_engines_are_told_what_is_known_of_them(tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    engines = check(tmp_path / "dense")["engines"]
    found = {verdict["engine"]: verdict["loads"] for verdict in engines}
    assert found["transformers"] == "yes"
    assert found["ONNX Runtime"] == "unknown"


def test_a_grid_of_methods_compares_encoder_decoders(tmp_path):
    """`liar compare` measures targets given their sources."""
    dense = tmp_path / "dense"
    PAIRED["t5"].build().save_pretrained(dense)
    words = {word: place for place, word in enumerate(["[PAD]", "[END]", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[END]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]")
    fast.save_pretrained(dense)
    lines = [
        json.dumps(
            {"source": " ".join(WORDS[i : i + 9]), "target": " ".join(WORDS[i + 9 : i + 12])}
        )
        for i in range(60)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines))
    options = ["--sparsities", "0.5", "--criteria", "wanda,magnitude", "--targets", "ffn"]
    tokens = str(write_tokens(tmp_path / "t.npy", samples=48))
    options += ["--calibration", tokens, "--samples", "48", "--seq-len", "12"]
    options += ["--eval", f"pairs={pairs}", "--out", str(tmp_path / "grid")]
    assert main(["compare", str(dense), *options, "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert len(found["cells"]) == 2
    for cell in (found["dense"], *found["cells"]):
        (metrics,) = cell["metrics"].values()
        assert (metrics["metric"], metrics["pairs"]) == ("perplexity", 60)


def test_card_and_page_say_what_an_encoder_decoder_is_loaded_and_measured_with(tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    small = tmp_path / "small"
    liar_ext.compress(tmp_path / "dense", small, _recipe(tmp_path, target=("ffn",)))
    assert "AutoModelForSeq2SeqLM" in (small / "README.md").read_text()
    assert main(["report", str(small)]) == 0
    page = (small / "report.html").read_text()
    assert "--pairs FILE.jsonl" in page
    assert "--text FILE.txt" not in page and "bench serve" not in page

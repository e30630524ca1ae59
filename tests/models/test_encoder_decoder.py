"""Encoder-decoders: both stacks are one chain of layers, with the tokens of both on their way."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from liar_families import (
    FAMILIES,
    PAIRED,
    Family,
    outputs,
    pairs_of,
    probe_tokens,
    tree_hash,
    write_tokens,
)
from liar_kill import Work, compress, differences, resume
from liar_stock import stock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LongT5Config, PreTrainedTokenizerFast, T5ForConditionalGeneration

import liar_ext
from liar_ext import InputError, Recipe, planning, planning_tokens
from liar_ext.calibration import Batch, Calibration
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


# of the largest logit; half precision rounds hidden states in other places where both stacks' are
# held together, and keeps 8 and 11 bits
ROUNDED = {torch.float32: TOLERANCE, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("name", PAIRED)
@torch.no_grad()
def test_layer_by_layer_is_what_the_model_does(name, dtype, tmp_path):
    PAIRED[name].build().save_pretrained(tmp_path)
    # in float16 transformers keeps the end of an FFN in float32
    model = PAIRED[name].auto.from_pretrained(tmp_path, dtype=dtype).eval()
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
    error = (found - expected)[target.attention_mask].abs().max()
    assert float(error) <= ROUNDED[dtype] * float(expected.abs().max())


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
    for stack, index, length in ((model.encoder, 1, 11), (model.decoder, 4, 7)):
        given = calls[index].args[1]
        attention = stack.block[0].layer[0].SelfAttention
        assert torch.equal(given, attention.compute_bias(length, length))
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
def test_criteria_and_searches_with_losses_run(criterion, allocation, tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(
        tmp_path, target=("ffn",), criterion=criterion, allocation=allocation, gradient_samples=8
    )
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    kept = sum(site.units_after for site in report.sites)
    assert kept == 5 * 24


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_gradients_of_the_decoders_loss_reach_both_stacks(name):
    """The neurons that Michel's criterion keeps, against autograd of transformers, a sample at a
    time: |sum over tokens of x dL/dx|, with L the mean loss of the next token of the target."""
    batches = [Batch.of_pair(*_ragged())]
    model = PAIRED[name].build()
    blocks = [*model.encoder.block, *model.decoder.block]
    scores = [torch.zeros(48, dtype=torch.float64) for _ in blocks]
    given: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            args[0].retain_grad()
            given[place] = args[0]

        return hook

    for place, block in enumerate(blocks):
        block.layer[-1].DenseReluDense.wo.register_forward_pre_hook(keep(place))
    for batch in batches:
        source, target = batch.parts
        for row in range(len(batch.input_ids)):
            own, its = (part.attention_mask[row] for part in (source, target))
            ids = target.input_ids[row][its]
            logits = model(
                input_ids=source.input_ids[row][own][None], decoder_input_ids=ids[None]
            ).logits[0]
            torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
            for place, x in given.items():
                scores[place] += (x.grad * x).sum((0, 1)).detach().double().abs()
    pruned = PAIRED[name].build()
    recipe = Recipe(
        sparsity=0.5, target=("ffn",), criterion="michel", reconstruct="none", bias="never"
    )
    liar_ext.prune(pruned, batches, recipe)
    for score, old, new in zip(
        scores, blocks, [*pruned.encoder.block, *pruned.decoder.block], strict=True
    ):
        kept = score.topk(24).indices.sort().values
        whole = old.layer[-1].DenseReluDense.wo.weight
        assert torch.equal(new.layer[-1].DenseReluDense.wo.weight, whole[:, kept])


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
    with pytest.raises(UnsupportedModelError, match="'longt5' cannot be pruned: it is an enc"):
        adapter_for(LongT5Config())


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


@pytest.mark.parametrize("lengths", [(12, 12), (17, 3)], ids=["alike", "apart"])
def test_forwards_are_counted_on_the_tokens_that_each_stack_reads(lengths, tmp_path, monkeypatch):
    """Against the rows that linears of the layers, and the head, are given in plain forwards."""
    model = PAIRED["t5"].build()
    model.save_pretrained(tmp_path / "dense")
    batches = [
        Batch.of_pair(*(Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in drawn))
        for drawn in [[torch.randint(3, 97, (32, length)) for length in lengths]] * 3
    ]
    made = Calibration(tuple(batches), "x", "0", 0, max(lengths), 96, tuple(range(96)), ())
    monkeypatch.setattr(planning_tokens, "load_calibration", lambda *_: made)
    recipe = _recipe(tmp_path, target=("ffn",))
    flops = {"first": 0, "layers": 0, "head": 0}

    def counting(what: str) -> Any:
        def count(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            flops[what] += 2 * args[0][..., 0].numel() * module.weight.numel()

        return count

    for stack in (model.encoder, model.decoder):
        for place, block in enumerate(stack.block):
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(counting("layers" if place else "first"))
    model.lm_head.register_forward_hook(counting("head"))
    with torch.no_grad():
        for batch in batches:
            source, target = batch.parts
            model(input_ids=source.input_ids, decoder_input_ids=target.input_ids, use_cache=False)
    rates = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}
    found = planning.plan(tmp_path / "dense", recipe, rates=rates)
    tokens = 96 * sum(lengths)
    # each layer's share is rounded to a number of FLOPs a token
    # first layers are run once more, for the position biases
    forward = 2 * flops["first"] + flops["layers"]
    assert found["flops"]["forward"] == pytest.approx(forward, abs=8 * tokens)
    each = found["flops_per_token"]["before"] * tokens
    assert each == pytest.approx(sum(flops.values()), abs=6 * tokens)
    # three Sites of the encoder's tokens, two of the decoder's
    rows = 96 * (3 * lengths[0] + 2 * lengths[1])
    assert found["flops"]["gram"] == pytest.approx(48**2 * rows, rel=1e-9)


@pytest.mark.parametrize("samples", [3, 48])
def test_tokens_are_counted_for_each_stack(samples, tmp_path):
    """36 tokens of each stack are fewer than 48 columns, though 72 of both are not."""
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), samples=samples)
    found = planning.plan(tmp_path / "dense", recipe, rates=None)["calibration"]
    if samples == 48:
        assert "only" not in str(found["problem"])
        return
    says = r"36 calibration tokens of the (en|de)coder \(72 in all\) for 48 columns"
    assert re.match(says, found["problem"])
    with pytest.raises(InputError, match=says):
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


@pytest.mark.parametrize("signal", ["local", "dense"])
def test_where_hidden_states_wait_makes_no_difference(signal, tmp_path):
    PAIRED["t5-gated"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), target_signal=signal)
    for name, where in (("one", "device"), ("other", "disk")):
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
    assert found["ONNX Runtime"] == "no"


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


def test_the_end_of_an_ffn_stays_wide_in_float16(tmp_path):
    """As transformers loads it: sums of an FFN pass what float16 can hold in real T5 models."""
    model = PAIRED["t5"].build()
    for block in (*model.encoder.block, *model.decoder.block):
        ffn = block.layer[-1].DenseReluDense
        ffn.wi.weight.data *= 300
        ffn.wo.weight.data *= 300
    model.half().save_pretrained(tmp_path)
    stock_model = PAIRED["t5"].auto.from_pretrained(tmp_path).eval()
    loaded = liar_ext.load(tmp_path)
    ffn = loaded.encoder.block[0].layer[1].DenseReluDense
    assert (ffn.wi.weight.dtype, ffn.wo.weight.dtype) == (torch.float16, torch.float32)
    assert torch.equal(outputs(loaded), outputs(stock_model))
    ids = probe_tokens()
    states = loaded.encoder(input_ids=ids, output_hidden_states=True).hidden_states
    assert float(states[1].detach().abs().max()) > torch.finfo(torch.float16).max


def test_a_model_of_half_precision_is_pruned_in_memory(tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",))
    residuals = []
    for dtype in (torch.float32, torch.float16):
        model = PAIRED["t5"].auto.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
        report = liar_ext.prune(model, pairs_of(recipe), recipe)
        residuals.append([site.relative_residual for site in report.sites])
    assert residuals[1] == pytest.approx(residuals[0], rel=0.02)


@pytest.mark.parametrize("only", [("encoder", "decoder"), ("encoder",), ("decoder",)], ids=str)
def test_any_name_of_a_tied_embedding_will_do(only, tmp_path):
    model = PAIRED["t5"].build()
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    file = dense / "model.safetensors"
    tensors = load_file(file)
    shared = tensors.pop("shared.weight")
    tensors |= {f"{stack}.embed_tokens.weight": shared.clone() for stack in only}
    save_file(tensors, file, {"format": "pt"})
    _close(outputs(liar_ext.load(dense)), outputs(model))
    recipe = _recipe(tmp_path, target=("ffn",))
    liar_ext.compress(dense, tmp_path / "small", recipe)
    pruned = PAIRED["t5"].build()
    liar_ext.prune(pruned, pairs_of(recipe), recipe)
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(pruned))


def test_a_pair_is_no_batch_of_an_encoder():
    recipe = Recipe(sparsity=0.5, target=("ffn",))
    with pytest.raises(InputError, match="this t5 model has no decoder"):
        liar_ext.prune(FAMILIES["t5-encoder"].build(), [Batch.of_pair(*_ragged())], recipe)


def test_the_first_layer_of_an_encoder_stays(tmp_path):
    """It makes what the others are given; found out before anything is measured."""
    FAMILIES["t5-encoder"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), span_repair="none", sparsity=0.25)
    listed = replace(recipe, drop_layers=(0,))
    with pytest.raises(InputError, match="the first layer makes what all others are given"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "out", listed)
    for seed in range(3):
        chosen = replace(recipe, depth="random", drop=1, seed=seed)
        out = tmp_path / f"out-{seed}"
        report = liar_ext.compress(tmp_path / "dense", out, chosen)
        assert report.layers["dropped"] == [1]
        assert torch.isfinite(outputs(liar_ext.load(out))).all()


def test_windows_of_text_are_told_from_pairs(tmp_path):
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",))
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert report.calibration["form"] == "windows of text, cut in the middle"
    assert any("pairs of texts (source, target)" in text for text in report.warnings)
    notes = planning.plan(tmp_path / "dense", recipe, rates=None)["notes"]
    assert any("pairs of texts (source, target)" in note for note in notes)


def test_sites_that_are_fitted_as_well_are_planned_on_their_own_tokens(tmp_path):
    """One layer is pruned, and all behind it are fitted, in both stacks."""
    PAIRED["t5"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn",), layers=(1, 2), refit="all", target_signal="dense")
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe)
    assert [site.layer for site in report.sites] == [1, 2, 3, 4]
    found = planning.plan(tmp_path / "dense", recipe, rates=None)["flops"]
    # Grams and products with the drift of 32 outputs, of half of the tokens each
    assert found["gram"] == 4 * (48**2 + 2 * 32 * 48) * (48 * 12)

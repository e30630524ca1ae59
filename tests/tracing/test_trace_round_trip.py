"""Families without an adapter, pruned at their traced Sites: prune, save, load, same function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import (
    FAMILIES,
    UNLISTED,
    WITHOUT_HEADS,
    batches_of,
    outputs,
    probe_tokens,
    randomise,
    tree_hash,
    without_adapters,
    write_tokens,
)

import liar_ext
from liar_ext import InputError, Recipe, UnsupportedModelError
from liar_ext.cli import main
from liar_ext.models import layout
from liar_ext.models.traced import KEY
from liar_ext.planning import plan
from liar_ext.tracing import trace

# float32 forward passes whose products are summed in another order
TOLERANCE = 1e-5
# whose config has a head size of its own, or takes one
STOCK_HEADS = ("phi", "starcoder2", "olmo", "cohere", "glm")


@pytest.fixture(autouse=True)
def _without_adapters() -> Iterator[None]:
    """These families as if nobody had written their adapters."""
    with without_adapters(*UNLISTED):
        yield


def _recipe(folder: Path, **changes: Any) -> Recipe:
    base = {
        "calibration": str(write_tokens(folder / "tokens.npy")),
        "sparsity": 0.5,
        "samples": 24,
        "seq_len": 24,
        "batch_size": 8,
    }
    return Recipe(**{**base, **changes})


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _stock(name: str, folder: Path) -> Any:
    model, info = UNLISTED[name].auto.from_pretrained(folder, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    return model.eval()


CASES = [
    *((n, "ffn" if n in WITHOUT_HEADS else "ffn,heads", "uniform") for n in UNLISTED),
    *((name, "ffn", "uniform") for name in ("gpt_neox", "falcon", "electra", "modernbert")),
    *((name, "ffn,heads", "global") for name in ("phi", "falcon", "glm", "modernbert")),
    *((name, "heads", "uniform") for name in ("stablelm", "olmo", "electra", "mpnet")),
]


@pytest.mark.parametrize(("name", "target", "allocation"), CASES)
def test_prune_save_load_gives_the_same_function(name, target, allocation, tmp_path):
    family, kinds = UNLISTED[name], tuple(target.split(","))
    family.build().save_pretrained(tmp_path / "dense")
    before = tree_hash(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=kinds, allocation=allocation)
    if "heads" in kinds and name in WITHOUT_HEADS:
        with pytest.raises(UnsupportedModelError, match="--target heads: the trace of .* found no"):
            liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
        return
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    assert tree_hash(tmp_path / "dense") == before, "the source was modified"
    in_memory = family.build()
    batches = batches_of(recipe, decoder=family.decoder)
    other = liar_ext.prune(in_memory, batches, recipe, trace=True)
    assert [s.units_after for s in other.sites] == [s.units_after for s in report.sites]
    expected = outputs(in_memory)
    loaded = liar_ext.load(tmp_path / "small")
    _close(outputs(loaded), expected)
    # other code of the same modules: attention written out
    loaded.set_attn_implementation("eager")
    _close(outputs(loaded), expected)
    gone = report.totals["site_parameters_before"] - report.totals["site_parameters_after"]
    assert gone > 0
    assert loaded.num_parameters() == family.build().num_parameters() - gone
    equal = all(len({s.units_after for s in report.sites if s.kind == k}) == 1 for k in kinds)
    stated = name != "bloom" and ("heads" not in kinds or name in STOCK_HEADS)
    assert report.layout == ("stock" if equal and stated else "liar_ext")
    if report.layout == "stock":
        _close(outputs(_stock(name, tmp_path / "small")), expected)
    else:
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            family.auto.from_pretrained(tmp_path / "small")
    # a trace of earlier is not taken for one of now
    with pytest.raises(InputError):
        liar_ext.compress(tmp_path / "small", tmp_path / "smaller", recipe)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_traced_text_model_inside_another_is_pruned_there(allocation, tmp_path):
    def build() -> Any:
        config = FAMILIES["llava"].build().config
        config.text_config = UNLISTED["olmo"].build().config
        return randomise(transformers.LlavaForConditionalGeneration(config))

    build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn", "heads"), allocation=allocation)
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    model = build()
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe, trace=True)
    loaded = liar_ext.load(tmp_path / "small")
    assert type(loaded.config.text_config).__name__ == "OlmoConfig"
    _close(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", [n for n, f in UNLISTED.items() if f.decoder])
def test_generation_with_and_without_cache_agree(name, tmp_path):
    UNLISTED[name].build().save_pretrained(tmp_path / "dense")
    target = ("ffn",) if name in WITHOUT_HEADS else ("ffn", "heads")
    recipe = _recipe(tmp_path, target=target)
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    model = liar_ext.load(tmp_path / "small")
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    ids = probe_tokens(2, 12)
    with_cache = model.generate(ids, use_cache=True, **options)
    assert with_cache.shape == (2, 28)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["gpt_neox", "olmo", "electra"])
def test_saving_a_loaded_model_again_keeps_the_function(name, tmp_path):
    UNLISTED[name].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn", "heads"))
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    model = liar_ext.load(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")
    _close(outputs(liar_ext.load(tmp_path / "again")), outputs(model))


METHODS = {
    "dense": {"target_signal": "dense"},
    "stream": {"target_signal": "stream"},
    "fisher": {"criterion": "fisher"},
    "taylor": {"criterion": "taylor-first"},
    "policy": {"criterion": "policy", "policy_steps": 2},
    "oneshot": {"statistics": "oneshot", "criterion": "obs"},
    "biases": {"bias": "always"},
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("falcon", method) for method in METHODS), ("gptj", "taylor"), ("gpt_neox", "stream")],
)
def test_methods_that_ask_more_of_an_adapter_work_at_traced_sites(name, method, tmp_path):
    """Layers that give back tuples, parallel blocks, a loss, biases that no config states."""
    UNLISTED[name].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn", "heads"), **METHODS[method])
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    model = UNLISTED[name].build()
    other = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe, trace=True)
    assert [s.units_after for s in other.sites] == [s.units_after for s in report.sites]
    _close(outputs(liar_ext.load(tmp_path / "small")), outputs(model))


def test_a_loss_is_refused_where_logits_are_more_than_the_output_embedding(tmp_path):
    UNLISTED["cohere"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, criterion="fisher")
    with pytest.raises(InputError, match="scales or bounds its logits"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    assert not (tmp_path / "small").exists()


def test_an_encoders_post_norm_has_no_stream_target(tmp_path):
    UNLISTED["electra"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target_signal="stream")
    with pytest.raises(InputError, match="post-norm"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)


def test_a_listed_family_keeps_its_adapter(tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path)
    liar_ext.compress(tmp_path / "dense", tmp_path / "plain", recipe)
    liar_ext.compress(tmp_path / "dense", tmp_path / "traced", recipe, trace=True)
    assert (tmp_path / "plain" / "config.json").read_bytes() == (
        tmp_path / "traced" / "config.json"
    ).read_bytes()


def test_a_family_without_an_adapter_needs_the_option(tmp_path):
    UNLISTED["gpt_neox"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path)
    for source in ("dense", "small"):
        with pytest.raises(UnsupportedModelError, match="`liar trace` may find its Sites"):
            liar_ext.compress(tmp_path / source, tmp_path / "other", recipe)
        if source == "dense":
            liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    # pruned to a stock checkpoint, it can be pruned again
    report = liar_ext.compress(tmp_path / "small", tmp_path / "smaller", recipe, trace=True)
    assert [(s.units_before, s.units_after) for s in report.sites] == [(24, 12), (24, 12)]


def test_a_trace_of_another_release_is_proved_again(tmp_path):
    UNLISTED["stablelm"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("heads",))
    liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    path = tmp_path / "small" / "config.json"
    data = json.loads(path.read_text())
    now = dict(data[KEY])
    # layers that gave back tuples, and kept keys and values
    data[KEY] |= {"transformers": "5.0.0", "returns": 2, "takes": {}}
    path.write_text(json.dumps(data))
    assert getattr(layout.build(data).config, KEY) == now
    # as if the modules had kept their width elsewhere then
    data[KEY]["sites"][0]["attributes"] = []
    with pytest.raises(InputError, match="is of transformers 5.0.0"):
        layout.build(data)
    data[KEY]["version"] = 2
    with pytest.raises(InputError, match=f"{KEY} version 2; this release reads 1"):
        layout.build(data)


def test_a_plan_says_what_the_traced_run_then_does(tmp_path):
    UNLISTED["falcon"].build().save_pretrained(tmp_path / "dense")
    recipe = _recipe(tmp_path, target=("ffn", "heads"))
    rates = dict.fromkeys(("forward", "gram", "solve", "residual"), 1e9)
    planned = plan(tmp_path / "dense", recipe, trace=True, rates=rates)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "small", recipe, trace=True)
    assert [s["units_after"] for s in planned["sites"]] == [s.units_after for s in report.sites]
    assert planned["parameters"]["after"] == report.totals["parameters_after"]
    assert planned["loader"]["layout"] == report.layout


def test_liar_trace_needs_config_json_alone(tmp_path, capsys):
    config = UNLISTED["falcon"].build().config
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    assert main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "heads: self_attention.dense, 4 units of 8 columns" in shown
    assert "falcon has no adapter: --trace" in shown
    assert main(["trace", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"source": str(tmp_path), **trace(config).to_json()}


def test_liar_trace_says_in_one_line_why_it_cannot(tmp_path, capsys):
    transformers.MixtralConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert main(["trace", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model type 'mixtral' cannot be pruned: it is a mixture")
    assert error.count("\n") == 1


def test_liar_compare_and_eval_take_a_traced_family(tmp_path, capsys):
    from liar_ext.demo import CALIBRATION, HELDOUT, MODEL

    dense = tmp_path / "dense"
    shutil.copytree(MODEL, dense, ignore=shutil.ignore_patterns("*.safetensors", "*.json"))
    for path in Path(MODEL).glob("*token*"):
        shutil.copy(path, dense)
    vocabulary = json.loads((Path(MODEL) / "config.json").read_text())["vocab_size"]
    config = transformers.GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=None,
        architectures=["GPTNeoXForCausalLM"],
    )
    randomise(transformers.GPTNeoXForCausalLM(config)).save_pretrained(dense)
    grid = ["--calibration", str(CALIBRATION), "--samples", "8", "--seq-len", "64"]
    cells = ["--sparsities", "0.5", "--targets", "ffn;heads", "--criteria", "wanda", "--json"]
    planned = ["plan", str(dense), *grid, "--preset", "best", "--json"]
    assert main(planned) == 2
    assert "`liar trace` may find its Sites" in capsys.readouterr().err
    assert main([*planned, "--trace"]) == 0
    recipe = json.loads(capsys.readouterr().out.splitlines()[-1])["recipe"]
    assert recipe["target_signal"] == "stream", "the trace saw that its layers are sums"
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(Path(HELDOUT).read_text()[:4000])
    text = f"text={held_out}"
    evaluation = ["--eval", text, "--eval-windows", "4", "--eval-seq-len", "64"]
    wanted = ["compare", str(dense), "--out", str(tmp_path / "c"), *grid, *cells, *evaluation]
    assert main(wanted) == 2
    assert "`liar trace` may find its Sites" in capsys.readouterr().err
    assert main([*wanted, "--trace"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [cell["status"] for cell in result["cells"]] == ["done", "done"]
    pruned = ["prune", str(dense), "--out", str(tmp_path / "small"), *grid, "--trace"]
    assert main(pruned) == 0
    assert main(["eval", str(tmp_path / "small"), "--text", str(held_out), "--json"]) == 0

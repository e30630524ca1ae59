"""Layers left out from file to file: what surgery makes in memory, and nothing half done."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import FAMILIES, outputs, tree_hash, write_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.depth import drop_layers, surgery
from liar_ext.depth.methods import parse_layers


@pytest.mark.parametrize("name", MODELS)
def test_files_hold_what_surgery_makes_in_memory(tmp_path, name):
    """In several shards, of which one starts inside a layer."""
    model = build(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    before = tree_hash(tmp_path / "dense")
    report = drop_layers(tmp_path / "dense", tmp_path / "out", [4, 1, 4])
    assert tree_hash(tmp_path / "dense") == before
    expected = surgery(model, [0, 2, 3, 5])
    model_class = getattr(transformers, MODELS[name][0])
    loaded, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), "nothing new, missing or left over"
    assert torch.equal(outputs(loaded.eval()), outputs(expected))
    assert report["layers"] == {"before": 6, "after": 4, "dropped": [1, 4]}
    parameters = sum(parameter.numel() for parameter in expected.parameters())
    assert report["totals"]["parameters_after"] == parameters
    names = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert not any(".4." in n or ".5." in n for n in names), "renumbered"


def test_the_result_is_pruned_and_evaluated_like_any_other(tmp_path):
    write_tokens(tmp_path / "tokens.npy")
    build("llama").save_pretrained(tmp_path / "dense")
    drop_layers(tmp_path / "dense", tmp_path / "shallow", [2, 3])
    fields = {"calibration": str(tmp_path / "tokens.npy"), "seq_len": 24, "samples": 24}
    recipe = liar_ext.Recipe(sparsity=0.5, **fields)
    liar_ext.compress(tmp_path / "shallow", tmp_path / "narrow", recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (4, 24)
    # and the other way round
    liar_ext.compress(tmp_path / "dense", tmp_path / "narrow-first", recipe)
    drop_layers(tmp_path / "narrow-first", tmp_path / "both", [2, 3])
    report = json.loads((tmp_path / "both" / "liar_report.json").read_text())
    assert report["calibration"]["source"].endswith("tokens.npy")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (4, 24)


def test_widths_of_their_own_stay_with_their_layers(tmp_path):
    write_tokens(tmp_path / "tokens.npy")
    FAMILIES["llama-gqa-biases"].build().save_pretrained(tmp_path / "dense")
    fields = {"calibration": str(tmp_path / "tokens.npy"), "seq_len": 24, "samples": 24}
    recipe = liar_ext.Recipe(sparsity=0.5, allocation="influence", **fields)
    liar_ext.compress(tmp_path / "dense", tmp_path / "pruned", recipe)
    drop_layers(tmp_path / "pruned", tmp_path / "out", [0])
    found = liar_ext.load(tmp_path / "out")
    expected = surgery(liar_ext.load(tmp_path / "pruned"), [1])
    assert torch.equal(outputs(found), outputs(expected))


def test_a_nested_model_keeps_its_other_parts(tmp_path):
    """LLaVA is stored under the names that it had in older releases."""
    family = FAMILIES["llava"]
    model = family.build()
    model.save_pretrained(tmp_path / "dense")
    drop_layers(tmp_path / "dense", tmp_path / "out", [0])
    loaded, info = family.auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), "nothing new, missing or left over"
    assert torch.equal(outputs(loaded.eval()), outputs(surgery(model, [1])))


def test_the_command_line(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "dense")
    out = str(tmp_path / "out")
    assert main(["prune", str(tmp_path / "dense"), "--out", out, "--drop-layers", "1,3-4"]) == 0
    assert "layers 6 -> 3" in capsys.readouterr().out
    again = ["prune", str(tmp_path / "dense"), "--out", out, "--drop-layers", "5", "--json"]
    assert main(again) == 2
    assert "exists; give another folder or --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["layers"]["dropped"] == [5]
    assert json.loads((tmp_path / "out" / "liar_report.json").read_text())["kind"] == "layers"
    assert "Left out, counted from 0: 5." in (tmp_path / "out" / "README.md").read_text()
    assert main(["report", out]) == 0
    assert "written: " in capsys.readouterr().out


def test_the_demo_without_a_layer_is_evaluated(tmp_path, capsys):
    from liar_ext.demo import HELDOUT, MODEL

    assert main(["prune", str(MODEL), "--out", str(tmp_path / "out"), "--drop-layers", "3"]) == 0
    measure = ["--text", str(HELDOUT), "--seq-len", "64", "--json"]
    assert main(["eval", str(tmp_path / "out"), *measure]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["value"] < 500


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (3,)), ("3,7", (3, 7)), ("5-7, 1", (1, 5, 6, 7))]
)
def test_lists_of_layers(text, expected):
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "1,,2", "1-", "2,2", "1-3,2"])
def test_what_is_no_list_of_layers(text):
    with pytest.raises(InputError, match="--drop-layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--drop-layers", "6"], "--drop-layers 6: the model has 6 layers, 0 to 5"),
        (["--drop-layers", "0-5"], "all 6 layers; keep at least one"),
        (["--drop-layers", "1", "--sparsity", "0.3"], "--calibration is missing"),
        (["--drop-layers", "1", "--depth", "reverse", "--drop", "1"], "both say which layers go"),
        (["--drop-layers", "1", "--layers", "0:2"], "--layers 0:2 with layers that are left out"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, capsys, options, words):
    build("llama").save_pretrained(tmp_path / "dense")
    assert main(["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_tensors_that_are_no_part_of_the_model_are_named(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.zeros(3)}, file, {"format": "pt"})
    out = str(tmp_path / "out")
    assert main(["prune", str(tmp_path / "dense"), "--out", out, "--drop-layers", "1"]) == 0
    assert "warning: 1 tensors of the source are no part" in capsys.readouterr().err


def test_a_model_without_a_list_of_layers_is_refused(tmp_path):
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16}
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(vocab_size=97, **sizes, **ffn)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="has 2 lists of 2 layers; one is needed"):
        drop_layers(tmp_path / "dense", tmp_path / "out", [0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "grow", "replace"])
def test_a_network_that_is_no_list_of_layers_is_refused(tmp_path, capsys, command):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("a text\n" * 40)
    options = {
        "prune": ["--drop-layers", "1"],
        "grow": ["--layers", "1"],
        "replace": ["--window", "0-1", "--train", str(tmp_path / "text.txt"), "--steps", "1"],
    }[command]
    out = tmp_path / "out"
    assert main([command, str(tmp_path / "dense"), "--out", str(out), *options]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "no num_hidden_layers" in line
    assert not out.exists()

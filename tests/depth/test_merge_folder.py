"""`liar merge`: from folder to folder, what the search found and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import FAMILIES, outputs, tree_hash, write_tokens
from liar_merge import last_states, padded, similarity, texts
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.cli import main
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.depth import MergeSettings, merge, merge_layers
from liar_ext.depth.rules import merge_reference, norm_names
from liar_ext.depth.surgery import layer_list
from liar_ext.engine.execution import Execution


@pytest.fixture
def tokens(tmp_path):
    """The texts of `liar_merge` as a file, padded."""
    ids = texts()
    longest = max(map(len, ids))
    rows = torch.stack([torch.cat([row, torch.full((longest - len(row),), 7)]) for row in ids])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in ids])
    save_file({"input_ids": rows, "attention_mask": mask}, tmp_path / "texts.safetensors")
    return str(tmp_path / "texts.safetensors")


def dense(tmp_path, name, dtype=torch.float32):
    """A folder in several shards, of which one starts inside a layer."""
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return model


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gptj"])
def test_files_hold_what_merge_makes_in_memory(tmp_path, tokens, name):
    model = dense(tmp_path, name)
    before = tree_hash(tmp_path / "dense")
    settings = MergeSettings(rule="rdsc", drop=3, combine=3, calibration=tokens, batch_size=3)
    report = merge_layers(tmp_path / "dense", tmp_path / "out", settings)
    assert tree_hash(tmp_path / "dense") == before
    expected, facts = merge(model, padded(texts()), settings)
    assert report["layers"] == facts["layers"]
    model_class = getattr(transformers, MODELS[name][0])
    loaded, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), "nothing new, missing or left over"
    assert torch.equal(outputs(loaded.eval()), outputs(expected))
    parameters = sum(parameter.numel() for parameter in expected.parameters())
    assert report["totals"]["parameters_after"] == parameters
    direct = similarity("flat", last_states(model, texts()), last_states(loaded, texts()))
    assert report["merge"]["accepted"][-1]["similarity"] == pytest.approx(direct, abs=2e-6)


@pytest.mark.parametrize("rule", ["rdsc", "telescope", "mean"])
def test_what_was_not_merged_is_copied_and_what_was_is_rounded_once(tmp_path, tokens, rule):
    """In bfloat16, where a second rounding would show."""
    model = dense(tmp_path, "llama", torch.bfloat16)
    settings = MergeSettings(rule=rule, drop=2, combine=3, calibration=tokens)
    report = merge_layers(tmp_path / "dense", tmp_path / "out", settings)
    (entry,) = report["layers"]["merged"]
    base, end = entry["layer"], entry["layer"] + 3
    source, found = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "out")
    _, layers = layer_list(model)
    parts = [dict(layer.named_parameters()) for layer in layers[base:end]]
    made = merge_reference(rule, parts, norm_names(layers[0]))
    kept = [*range(base + 1), *range(end, 6)]
    assert report["config"]["num_hidden_layers"] == len(kept) == 4
    for name, tensor in found.items():
        place = name.split("layers.")[1].split(".")[0] if "layers." in name else None
        layer = None if place is None else kept[int(place)]
        if layer == base:
            wanted = made[name.split(f"layers.{place}.")[1]].to(torch.bfloat16)
        else:
            wanted = source[name if layer is None else name.replace(place, str(layer), 1)]
        assert torch.equal(tensor, wanted), name


def test_a_trial_on_disk_reads_the_layers_that_it_runs(tmp_path, tokens, monkeypatch):
    dense(tmp_path, "llama")
    reads = []
    read = CheckpointStore._read

    def noted(self, index):
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(CheckpointStore, "_read", noted)
    settings = MergeSettings(drop=2, combine=3, calibration=tokens)
    found = merge_layers(tmp_path / "dense", tmp_path / "out", settings, weights="disk")
    assert len(reads) == found["merge"]["layer_evaluations"]["done"]


def test_layers_and_states_on_disk_change_nothing(tmp_path, tokens):
    """One layer in memory at a time; merged ones are made again each time."""
    dense(tmp_path, "qwen3-windows", torch.bfloat16)
    settings = MergeSettings(rule="rdsc", drop=3, combine=2, interval=1, calibration=tokens)
    first = merge_layers(tmp_path / "dense", tmp_path / "a", settings, weights="memory")
    second = merge_layers(
        tmp_path / "dense",
        tmp_path / "b",
        settings,
        weights="disk",
        execution=Execution(hidden_states="disk"),
    )
    assert len(first["merge"]["accepted"]) > 1
    assert first["merge"] == second["merge"], "similarities to the bit"
    assert (first["run"]["weights"], second["run"]["weights"]) == ("memory", "disk")
    assert second["run"]["hidden_states"] == "disk"
    ours, theirs = tree_hash(tmp_path / "a"), tree_hash(tmp_path / "b")
    ours.pop("liar_report.json")
    theirs.pop("liar_report.json")
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "b", "dense"]


def test_texts_too_large_for_memory_and_models_too(tmp_path, tokens, monkeypatch):
    from liar_ext.depth import merge_subject
    from liar_ext.engine import execution

    monkeypatch.setattr(merge_subject, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(execution, "free_bytes", lambda device: 1000)
    dense(tmp_path, "llama")
    settings = MergeSettings(drop=1, calibration=tokens)
    report = merge_layers(tmp_path / "dense", tmp_path / "out", settings)
    assert report["run"]["weights"] == report["run"]["hidden_states"] == "disk"
    with pytest.raises(InputError, match=r"--weights memory: all layers take .* KiB, 1000 B are"):
        merge_layers(tmp_path / "dense", tmp_path / "no", settings, weights="memory")


def test_a_family_without_an_adapter_is_traced(tmp_path, tokens, capsys):
    model = dense(tmp_path, "gptj")
    options = ["--calibration", tokens, "--drop", "2", "--combine", "2", "--out"]
    assert main(["merge", str(tmp_path / "dense"), *options, str(tmp_path / "out")]) == 2
    assert "--trace" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "dense"), *options, str(tmp_path / "out"), "--trace"]) == 0
    loaded, info = transformers.GPTJForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_layer"] == 4
    assert not any(key.startswith("liar") for key in config), "as stock as the source"
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    direct = similarity("flat", last_states(model, texts()), last_states(loaded.eval(), texts()))
    assert report["merge"]["accepted"][-1]["similarity"] == pytest.approx(direct, abs=2e-6)


def test_a_nested_model_with_names_of_old_is_merged(tmp_path):
    tokens = str(write_tokens(tmp_path / "tokens.npy"))
    family = FAMILIES["llava"]
    family.build().save_pretrained(tmp_path / "dense")
    settings = MergeSettings(drop=1, calibration=tokens, seq_len=12)
    merge_layers(tmp_path / "dense", tmp_path / "out", settings)
    loaded, info = family.auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.get_text_config().num_hidden_layers == 1


def test_pruned_models_of_equal_shapes_are_merged_and_others_refused(tmp_path):
    tokens = str(write_tokens(tmp_path / "tokens.npy"))
    build("bert").save_pretrained(tmp_path / "dense")
    fields = {"calibration": tokens, "seq_len": 24, "samples": 24, "target": ("heads",)}
    recipe = liar_ext.Recipe(sparsity=0.5, **fields)
    liar_ext.compress(tmp_path / "dense", tmp_path / "narrow", recipe)
    settings = MergeSettings(drop=2, calibration=tokens, seq_len=12)
    report = merge_layers(tmp_path / "narrow", tmp_path / "out", settings)
    model = liar_ext.load(tmp_path / "out")
    kept = [layer for layer in range(6) if layer not in report["layers"]["dropped"]]
    assert model.config.num_hidden_layers == len(kept) == 4
    assert "liar_ext.load" in (tmp_path / "out" / "README.md").read_text()
    build("llama").save_pretrained(tmp_path / "wide")
    fields["target"] = ("ffn",)
    recipe = liar_ext.Recipe(sparsity=0.5, allocation="influence", **fields)
    liar_ext.compress(tmp_path / "wide", tmp_path / "uneven", recipe)
    with pytest.raises(InputError, match="different shapes cannot be merged; merge the dense"):
        merge_layers(tmp_path / "uneven", tmp_path / "no", settings)


def test_layers_below_the_range_may_have_shapes_of_their_own(tmp_path):
    tokens = str(write_tokens(tmp_path / "tokens.npy"))
    build("llama").save_pretrained(tmp_path / "dense")
    fields = {"calibration": tokens, "seq_len": 24, "samples": 24}
    recipe = liar_ext.Recipe(sparsity=0.5, layers=(0, 2), **fields)
    liar_ext.compress(tmp_path / "dense", tmp_path / "uneven", recipe)
    settings = MergeSettings(drop=1, calibration=tokens, seq_len=12)
    with pytest.raises(InputError, match="layers.2.mlp.down_proj.weight has shape"):
        merge_layers(tmp_path / "uneven", tmp_path / "out", settings)
    settings = MergeSettings(drop=1, lowest=2, calibration=tokens, seq_len=12)
    merge_layers(tmp_path / "uneven", tmp_path / "out", settings)
    assert liar_ext.load(tmp_path / "out").config.num_hidden_layers == 5


def test_the_command_line_on_the_demo(tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["merge", str(MODEL), "--out", out, "--calibration", str(CALIBRATION)]
    assert main([*command, "--drop", "1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 layers become one at layers 2 to 0, downwards" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--drop", "1"]) == 0
    said = capsys.readouterr()
    assert "layers 5 -> 4" in said.out
    assert "layers run: 14; 17 with whole models, 27 with the original beside each" in said.out
    assert "layer 1 with 2: similarity" in said.err
    assert main([*command, "--drop", "2", "--json"]) == 2
    assert "exists; give another folder or --overwrite" in capsys.readouterr().err
    assert main([*command, "--drop", "2", "--json", "--overwrite"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["out"] == out
    written = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    assert {"out": out, **written} == report
    assert report["kind"] == "layers"
    assert report["calibration"]["samples"] == 10
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 3
    assert (
        "| layer | takes in | similarity to the original |"
        in (tmp_path / "out" / "README.md").read_text()
    )
    part = tmp_path / "part.txt"
    part.write_text(CALIBRATION.read_text()[:20000])
    assert main(["eval", out, "--text", str(part), "--seq-len", "64"]) == 0
    assert "warning" in capsys.readouterr().err, "what it was calibrated on is no held-out text"
    assert main(["report", out]) == 0
    assert "written: " in capsys.readouterr().out


def test_help_says_the_defaults_and_imports_no_torch(capsys):
    import dataclasses
    import subprocess
    import sys

    from liar_ext.cli.merge import OPTIONS

    for field in dataclasses.fields(MergeSettings):
        if field.default is not None:
            assert f"default {field.default})" in OPTIONS[field.name][2], field.name
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(MergeSettings)}
    code = (
        "import sys; from liar_ext.cli import build_parser; build_parser([]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_the_threshold_that_was_found_gives_the_same_model(tmp_path, tokens):
    dense(tmp_path, "llama")
    settings = MergeSettings(drop=3, combine=3, calibration=tokens, rule="rdsc")
    found = merge_layers(tmp_path / "dense", tmp_path / "a", settings)["merge"]["threshold"]
    settings = MergeSettings(drop=3, combine=3, calibration=tokens, rule="rdsc", threshold=found)
    merge_layers(tmp_path / "dense", tmp_path / "b", settings)
    assert (
        tree_hash(tmp_path / "a")["model.safetensors"]
        == (tree_hash(tmp_path / "b")["model.safetensors"])
    )


def test_a_plan_counts_what_a_search_runs_that_accepts_nothing(tmp_path, tokens):
    from liar_ext.depth.merge_folder import merge_plan

    dense(tmp_path, "llama")
    settings = MergeSettings(combine=3, threshold=0.999, calibration=tokens)
    plan = merge_plan(tmp_path / "dense", tmp_path / "out", settings)
    model = build("llama")
    settings = MergeSettings(combine=3, drop=2, lowest=0, rule="mean")
    _, facts = merge(model, padded(texts()), settings)
    # found in walks of which the first accepts nothing
    assert plan["layer_evaluations_at_most"] <= facts["merge"]["layer_evaluations"]["done"]
    assert plan["layer_evaluations_at_most"] == 6 + 2 + 3 + 4
    assert plan["bases"] == [2, 1, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--combine", "7"], "--combine 7: the model has 6 layers"),
        (["--lowest", "3", "--highest", "3"], "--lowest 3 with --highest 3: must be below it"),
        (["--threshold", "-1"], "--threshold -1.0: is a cosine; must be above -1"),
        (["--threshold", "1.5"], "--threshold 1.5: is a cosine; must be above -1"),
        (["--threshold", "0.999"], "no merge is above --threshold 0.999: the highest is 0."),
        (["--drop", "2", "--threshold", "0.999"], "--drop 2: 0 go, no other merge is above"),
        (["--drop", "5", "--lowest", "4", "--highest", "6"], "with every merge accepted 1 layers"),
        (["--drop", "6"], "--drop 6: of 6 layers at least one stays"),
        (["--rule", "sum"], "--rule sum: choose from rdsc, telescope, mean"),
        (["--weights", "gpu"], "--weights gpu: choose from auto, memory, disk"),
        (["--hidden-states", "host"], "--hidden-states host: is memory beside a GPU"),
        (["--hidden-states", "attic"], "--hidden-states attic: choose from"),
        (["--scratch", "/nowhere"], "--scratch /nowhere: no such folder"),
        (["--calibration", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, tokens, capsys, options, words):
    build("llama").save_pretrained(tmp_path / "dense")
    before = tree_hash(tmp_path)
    command = ["merge", str(tmp_path / "dense"), "--out", str(tmp_path / "out")]
    assert main([*command, "--calibration", tokens, *options]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line
    assert tree_hash(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "texts.safetensors"]


def test_more_bad_input(tmp_path, tokens, capsys, monkeypatch):
    build("llama").save_pretrained(tmp_path / "dense")
    command = ["merge", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), "--drop", "1"]
    assert main(command) == 2
    assert "--calibration is missing" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("a line\n")
    assert main([*command, "--calibration", str(text)]) == 2
    assert "no usable tokenizer" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--calibration", tokens]) == 2
    assert "WORLD_SIZE is 2: liar merge is one process" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    config = tmp_path / "dense" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"scale_attn_by_inverse_layer_idx": True}))
    assert main([*command, "--calibration", tokens]) == 2
    assert "cannot be left out or moved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, tokens, monkeypatch):
    from liar_ext.checkpoint.shards import ShardWriter

    dense(tmp_path, "llama")

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write_pieces", full)
    with pytest.raises(InputError, match="writing failed .No space left"):
        merge_layers(
            tmp_path / "dense", tmp_path / "out", MergeSettings(drop=1, calibration=tokens)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "texts.safetensors"]


def test_texts_are_lines_with_special_tokens_padded_on_the_right(tmp_path):
    """Also where the tokenizer pads on the left, or has nothing to pad with."""
    import shutil

    from liar_ext.depth.merge_subject import load_texts

    folder = shutil.copytree(MODEL, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("def f(self): returns a list\n\nopen\nthe first of all keys in the map\n")
    config = folder / "tokenizer_config.json"
    settings = MergeSettings(calibration=str(text), seq_len=64)
    model = liar_ext.load(folder)
    found = []
    for changes in ({}, {"pad_token": None, "padding_side": "left"}):
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        (batch,) = load_texts(folder, model, settings).batches
        lengths = batch.attention_mask.sum(1)
        assert len(lengths) == 3
        assert torch.equal(
            batch.attention_mask, torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        )
        found.append(batch.input_ids.masked_fill(~batch.attention_mask, -1))
    assert torch.equal(*found)

"""`liar recover`, from folder to folder: what is written, what is gone on from, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from liar_depth import build
from liar_families import outputs, tree_hash, write_tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.demo import MODEL
from liar_ext.recovery import Schedule, TrainingState
from liar_ext.recovery.rank_search import TrialJournal
from liar_ext.recovery.settings import Recovery
from liar_ext.report.schema import calibration_of

SIZES = [
    *("--steps", "6", "--lr", "1e-2", "--batch-size", "2", "--seq-len", "24"),
    *("--save-every", "2", "--held-out", "3"),
]
LORA = ["--method", "lora", "--rank", "2"]
SEARCH = [
    *(*LORA, "--ranks", "performance", "--trial-initial", "2", "--trial-rounds", "2"),
    *("--trial-proposals", "6", "--trial-steps", "3"),
]


@pytest.fixture
def command(tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokens = write_tokens(tmp_path / "tokens.npy", samples=30)
    return ["recover", str(tmp_path / "dense"), "--train", str(tokens), *SIZES]


def weights(folder):
    return load_file(folder / "model.safetensors")


def report_of(folder):
    return json.loads((folder / "liar_report.json").read_text())


def test_only_the_upper_part_changes(tmp_path, command, capsys):
    before = tree_hash(tmp_path / "dense")
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), "--last", "2"]) == 0
    assert "parameters for 6 steps: held-out loss" in capsys.readouterr().out
    assert tree_hash(tmp_path / "dense") == before
    dense, found = weights(tmp_path / "dense"), weights(out)
    upper = ("model.layers.4.", "model.layers.5.", "model.norm.", "lm_head.")
    assert dense.keys() == found.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, dense[name]) != name.startswith(upper), name
    report = report_of(out)
    told = report["training"]
    assert told["trained_layers"] == [4, 5]
    assert told["parameters"] == sum(v.numel() for n, v in found.items() if n.startswith(upper))
    # the looks as well, of all windows each time
    assert told["windows_below"] == 6 * 2 + 7 * 3
    assert report["calibration"]["source"].endswith("tokens.npy")
    assert "Layers 4, 5, what follows them and the head" in (out / "README.md").read_text()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy", "out"}


def test_states_on_disk_change_nothing(tmp_path, command):
    """Thirty windows of which three are held out: each goes through the lower layers once."""
    for name, more in (("a", []), ("b", ["--cache-states"])):
        assert main([*command, "--out", str(tmp_path / name), "--last", "2", *more]) == 0
    assert (
        tree_hash(tmp_path / "a")["model.safetensors"]
        == (tree_hash(tmp_path / "b")["model.safetensors"])
    )
    a, b = (report_of(tmp_path / name)["training"] for name in "ab")
    assert (a["log"], a["held_out"]) == (b["log"], b["held_out"])
    assert b["windows_below"] == 6 * 2 + 3
    # on a CPU bfloat16 files are computed in float32
    assert b["state_bytes"] == 15 * 24 * 32 * 4
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy", "a", "b"}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "gemma3"])
def test_a_tied_head(tmp_path, capsys, name):
    model = build(name)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    dense = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    tokens = str(write_tokens(tmp_path / "tokens.npy", samples=30))
    command = ["recover", str(tmp_path / "dense"), "--train", tokens, *SIZES]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "tied to its embeddings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--out", str(tmp_path / "no-head"), "--no-head"]) == 0
    assert weights(tmp_path / "no-head").keys() == weights(tmp_path / "dense").keys()
    assert main([*command, "--out", str(tmp_path / "own"), "--untie"]) == 0
    assert (
        json.loads((tmp_path / "own" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    embeddings = found.get_input_embeddings().weight
    was = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").get_input_embeddings().weight
    assert torch.equal(embeddings, was)
    assert not torch.equal(found.get_output_embeddings().weight, embeddings)
    assert not torch.allclose(outputs(found), dense, atol=1e-2)
    torch.testing.assert_close(outputs(liar_ext.load(tmp_path / "own")), outputs(found))


def interrupt(monkeypatch, at):
    """Ctrl-C while the state number `at` is saved."""
    save, saved = TrainingState.save, []

    def interrupted(self, step, tensors, numbers):
        if len(saved) == at:
            raise KeyboardInterrupt
        save(self, step, tensors, numbers)
        saved.append(step)

    monkeypatch.setattr(TrainingState, "save", interrupted)
    return lambda: monkeypatch.setattr(TrainingState, "save", save)


@pytest.mark.parametrize("method", [["--cache-states"], LORA])
def test_an_interrupted_training_goes_on_to_the_same_files(
    tmp_path, command, capsys, monkeypatch, method
):
    command += method
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    restore = interrupt(monkeypatch, 1)
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, *out]) == 2
    restore()
    assert "interrupted; 2 steps of training are kept, --resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, *out]) == 2
    assert "an unfinished training is in" in capsys.readouterr().err
    assert main([*command, *out, "--resume", "--seed", "1"]) == 2
    assert "--resume: schedule.seed is 1, and 0 in" in capsys.readouterr().err
    assert main([*command, *out, "--resume", "--save-every", "5"]) == 0
    files = ("model.safetensors", "config.json")
    one, other = tree_hash(tmp_path / "whole"), tree_hash(tmp_path / "out")
    assert all(one[name] == other[name] for name in files)
    whole, resumed = (report_of(tmp_path / n)["training"] for n in ("whole", "out"))
    assert resumed["resumed_at"] == 2
    assert (resumed["log"], resumed["held_out"]) == (whole["log"], whole["held_out"])
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupted_search_loses_nothing(tmp_path, command, capsys, monkeypatch):
    """In the middle of the third trial: two are not trained again, and of it two steps are not."""
    command += SEARCH
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = report_of(tmp_path / "whole")["training"]
    assert len(whole["trials"]) == 4
    best = min(whole["trials"], key=lambda trial: trial["loss"])
    assert whole["ranks"] == best["ranks"]
    budget = whole["budget"]
    assert whole["parameters"] <= budget
    out = ["--out", str(tmp_path / "out")]
    # one state in each trial of three steps, at the second
    save, saved = TrainingState.save, []

    def cut(self, step, tensors, numbers):
        save(self, step, tensors, numbers)
        saved.append(self.folder.name)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", cut)
    assert main([*command, *out]) == 2
    monkeypatch.setattr(TrainingState, "save", save)
    assert saved == ["trial-0000", "trial-0001", "trial-0002"]
    assert "2 trials of training are kept, --resume goes on" in capsys.readouterr().err
    added, add = [], TrialJournal.add
    monkeypatch.setattr(
        TrialJournal, "add", lambda self, *entry: (added.append(entry), add(self, *entry))
    )
    assert main([*command, *out]) == 2
    assert "(2 trials); --resume" in capsys.readouterr().err
    assert main([*command, *out, "--resume"]) == 0
    assert len(added) == 2
    resumed = report_of(tmp_path / "out")["training"]
    assert resumed["trials"] == whole["trials"]
    one, other = tree_hash(tmp_path / "whole"), tree_hash(tmp_path / "out")
    assert one["model.safetensors"] == other["model.safetensors"]
    assert not list(tmp_path.glob(".out*"))


def test_a_search_is_gone_on_from_by_the_same_search(tmp_path, command, capsys, monkeypatch):
    """Not left behind by another training, which would begin from nothing and remove it."""
    out = ["--out", str(tmp_path / "out")]
    add = TrialJournal.add

    def cut(self, *entry):
        add(self, *entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrialJournal, "add", cut)
    assert main([*command, *SEARCH, *out]) == 2
    monkeypatch.setattr(TrialJournal, "add", add)
    assert "1 trials of training are kept" in capsys.readouterr().err
    for other in ([], LORA, [*SEARCH, "--seed", "1"]):
        assert main([*command, *other, *out, "--resume"]) == 2
        assert "--resume: " in capsys.readouterr().err
        assert TrainingState(tmp_path / ".out.train", {}).left() == "1 trials"
    assert main([*command, *SEARCH, *out, "--resume"]) == 0


def test_overwrite_starts_a_search_again(tmp_path, command, monkeypatch):
    restore = interrupt(monkeypatch, 1)
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, *SEARCH, *out]) == 2
    restore()
    assert (tmp_path / ".out.train").exists()
    assert main([*command, *LORA, *out, "--overwrite"]) == 0
    assert not (tmp_path / ".out.train").exists()


def test_instructions_are_learned_from(tmp_path, capsys):
    records = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n)))}
        for n in range(3, 15)
    ]
    records.append({"instruction": "long " * 300, "output": "no"})
    text = tmp_path / "alpaca.jsonl"
    text.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["recover", str(MODEL), "--out", str(tmp_path / "out"), "--train", str(text)]
    sizes = ["--steps", "8", "--lr", "1e-3", "--batch-size", "4", "--seq-len", "64"]
    assert main([*command, *sizes, "--held-out", "1", "--no-head", "--last", "1", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert "1 records were left out" in captured.err
    assert report["training"]["windows"] == 11
    looks = report["training"]["held_out"]
    assert looks[-1]["loss"] < looks[0]["loss"]


def test_what_was_recovered_is_a_folder_like_others(tmp_path, command, capsys):
    """Trained again, its report named, its text noticed."""
    assert main([*command, "--out", str(tmp_path / "a"), *LORA, "--keep-adapter"]) == 0
    again = ["recover", str(tmp_path / "a"), *command[2:]]
    assert main([*again, "--out", str(tmp_path / "b")]) == 0
    assert not (tmp_path / "b" / "adapter").exists()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "b")]) == 0
    assert "written: " in capsys.readouterr().out
    assert calibration_of(tmp_path / "b")["source"] == str(tmp_path / "tokens.npy")
    assert main([*again, "--out", str(tmp_path / "b")]) == 2
    assert "exists; give another folder or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "full"], "--method full: choose from partial, lora"),
        (["--last", "7"], "--last 7: the model has 6 layers; give 1 to 6"),
        (["--rank", "4"], "--rank: is of --method lora, not of partial"),
        ([*LORA, "--untie"], "--untie: is of --method partial, not of lora"),
        ([*LORA, "--dense", "x"], "--dense: is of --ranks residual"),
        ([*LORA, "--trial-steps", "3"], "--trial-steps: is of --ranks performance"),
        ([*LORA, "--ranks", "best"], "--ranks best: choose from uniform, residual, performance"),
        ([*LORA, "--rank", "0"], "--rank 0: must be at least 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--train", "nothing.txt"], "nothing.txt: no such file"),
        (["--untie"], "--untie: the head of this model is not tied"),
        ([*SEARCH, "--held-out", "0"], "--held-out must be at least 1"),
        (["--device", "tpu"], "--device tpu: choose from"),
    ],
)
def test_what_is_refused(tmp_path, command, capsys, options, words):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_encoder_is_refused(tmp_path, command, capsys):
    build("bert").save_pretrained(tmp_path / "bert")
    command[1] = str(tmp_path / "bert")
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "BertForMaskedLM predicts no next token" in capsys.readouterr().err


def test_settings_in_python_say_the_same():
    with pytest.raises(InputError, match="--seq-len 1: must be at least 2"):
        Recovery("text.txt", Schedule(1), seq_len=1)
    with pytest.raises(InputError, match="give --dense DIR"):
        Recovery("text.txt", Schedule(1), method="lora", ranks="residual")

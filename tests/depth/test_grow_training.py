"""New layers are trained, the others are not; an interrupted training goes on to the same files."""

from __future__ import annotations

import json

import pytest
import torch
from liar_depth import build
from liar_families import outputs, tree_hash, write_tokens
from safetensors.torch import load_file

import liar_ext
from liar_ext.cli import main
from liar_ext.recovery import Loss, TrainingState, next_token_loss

SIZES = [
    "--steps",
    "6",
    "--lr",
    "1e-2",
    "--batch-size",
    "2",
    "--seq-len",
    "24",
    "--save-every",
    "2",
]


@pytest.fixture
def command(tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    write_tokens(tmp_path / "tokens.npy", samples=30)
    return ["grow", str(tmp_path / "dense"), "--insert", "1,3", "--predictor", "ridge"]


def training(tmp_path, out, *more):
    text = ["--train", str(tmp_path / "tokens.npy"), *SIZES]
    return ["--out", str(tmp_path / out), *text, *more]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_only_the_new_layers_are_trained(tmp_path, command, capsys):
    before = tree_hash(tmp_path / "dense")
    assert main([*command, "--out", str(tmp_path / "grown")]) == 0
    assert main([*command, *training(tmp_path, "out")]) == 0
    printed = capsys.readouterr().out
    assert "parameters for 6 steps: held-out loss" in printed
    assert tree_hash(tmp_path / "dense") == before
    new = ("model.layers.2.", "model.layers.5.")
    grown, trained = weights(tmp_path / "grown"), weights(tmp_path / "out")
    assert grown.keys() == trained.keys()
    for name, value in trained.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, grown[name]) != name.startswith(new), name
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    told = report["training"]
    assert (told["steps"], told["tokens"], told["windows"]) == (6, 6 * 2 * 24, 27)
    assert told["held_out_windows"] == 3
    # the tokens are random, so that there is nothing to learn for other windows
    assert [look["step"] for look in told["held_out"]] == list(range(7))
    assert len({look["loss"] for look in told["held_out"]}) == 7
    assert told["schedule"]["learning_rate"] == 1e-2
    assert "were trained on the next tokens" in (tmp_path / "out" / "README.md").read_text()
    assert report["calibration"]["source"].endswith("tokens.npy")
    assert torch.isfinite(outputs(liar_ext.load(tmp_path / "out"))).all()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy", "grown", "out"}


def test_an_interrupted_training_goes_on_to_the_same_files(tmp_path, command, capsys, monkeypatch):
    assert main([*command, *training(tmp_path, "whole")]) == 0
    save, saved = TrainingState.save, []

    def interrupted(self, step, tensors, numbers):
        if saved:
            raise KeyboardInterrupt
        save(self, step, tensors, numbers)
        saved.append(step)

    monkeypatch.setattr(TrainingState, "save", interrupted)
    assert main([*command, *training(tmp_path, "out")]) == 2
    error = capsys.readouterr().err
    assert "interrupted; 2 steps of training are kept, --resume goes on" in error
    monkeypatch.setattr(TrainingState, "save", save)
    assert not (tmp_path / "out").exists()
    state = tmp_path / ".out.train"
    assert [path.name for path in state.iterdir()] == ["step-000000002"]
    # neither is lost by accident, nor gone on from with another training
    assert main([*command, *training(tmp_path, "out")]) == 2
    assert "an unfinished training is in" in capsys.readouterr().err
    assert main([*command, *training(tmp_path, "out", "--resume", "--steps", "7")]) == 2
    assert "--resume: schedule.steps is 7, and 6 in" in capsys.readouterr().err
    assert main([*command, *training(tmp_path, "out", "--resume", "--seed", "1")]) == 2
    assert "--resume: growth.seed is 1, and 0 in" in capsys.readouterr().err
    # the same files under another config are another source
    config = tmp_path / "dense" / "config.json"
    text = config.read_text()
    changed = json.loads(text)
    changed["rope_parameters"]["rope_theta"] = 500.0
    config.write_text(json.dumps(changed))
    assert main([*command, *training(tmp_path, "out", "--resume")]) == 2
    assert "--resume: source.config is" in capsys.readouterr().err
    config.write_text(text)
    # how often a state is kept does not matter
    assert main([*command, *training(tmp_path, "out", "--resume", "--save-every", "5")]) == 0
    assert not state.exists()
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    expected = json.loads((tmp_path / "whole" / "liar_report.json").read_text())
    assert report["training"]["resumed_at"] == 2
    assert report["training"]["log"] == expected["training"]["log"]
    assert report["training"]["held_out"] == expected["training"]["held_out"]


def test_overwrite_starts_again(tmp_path, command, monkeypatch):
    def cut(self, step, *rest):
        save(self, step, *rest)
        raise KeyboardInterrupt

    save = TrainingState.save
    monkeypatch.setattr(TrainingState, "save", cut)
    assert main([*command, *training(tmp_path, "out")]) == 2
    monkeypatch.setattr(TrainingState, "save", save)
    assert main([*command, *training(tmp_path, "out", "--overwrite")]) == 0
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    assert report["training"]["resumed_at"] == 0
    assert not (tmp_path / ".out.train").exists()


def test_what_goes_wrong_after_a_state_says_so(tmp_path, command, capsys, monkeypatch):
    def broken(model):
        made = next_token_loss(model)

        def loss(batch):
            found = made(batch)
            steps.append(torch.is_grad_enabled())
            return Loss(found.total * torch.nan, found.count) if sum(steps) > 1 else found

        return loss

    steps: list[bool] = []
    monkeypatch.setattr("liar_ext.depth.grow.training.next_token_loss", broken)
    assert main([*command, *training(tmp_path, "out", "--save-every", "1")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "training, step 2: the loss is nan" in line
    assert "1 steps of training are kept, --resume goes on from there" in line
    assert not (tmp_path / "out").exists()


def test_evaluating_on_the_text_of_the_training_is_noticed(tmp_path, capsys):
    from liar_ext.demo import CALIBRATION, MODEL

    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    out = str(tmp_path / "out")
    command = ["grow", str(MODEL), "--out", out, "--layers", "1", "--predictor", "identity"]
    sizes = ["--steps", "1", "--batch-size", "1", "--seq-len", "32"]
    assert main([*command, "--train", str(text), *sizes]) == 0
    assert main(["eval", out, "--text", str(text), "--seq-len", "64"]) == 0
    assert "is the text the model was calibrated on" in capsys.readouterr().err


def test_a_text_of_one_window(tmp_path, command, capsys):
    write_tokens(tmp_path / "tokens.npy", samples=1)
    assert main([*command, *training(tmp_path, "out")]) == 2
    assert "one window of 24 tokens, and some are held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, *training(tmp_path, "out", "--held-out", "0")]) == 0
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    assert report["training"]["held_out"] == []
    assert report["training"]["log"][-1]["loss"] < report["training"]["log"][0]["loss"]


def test_an_encoder_is_grown_and_not_trained(tmp_path, capsys):
    build("bert").save_pretrained(tmp_path / "dense")
    write_tokens(tmp_path / "tokens.npy")
    command = ["grow", str(tmp_path / "dense"), "--insert", "1"]
    assert main([*command, *training(tmp_path, "out")]) == 2
    assert "BertForMaskedLM predicts no next token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "llama-tied"])
def test_other_families_are_trained(tmp_path, name):
    build(name).save_pretrained(tmp_path / "dense")
    write_tokens(tmp_path / "tokens.npy", samples=30)
    command = ["grow", str(tmp_path / "dense"), "--insert", "3", "--predictor", "average"]
    assert main([*command, *training(tmp_path, "out")]) == 0
    assert main([*command, "--out", str(tmp_path / "grown")]) == 0
    grown, trained = weights(tmp_path / "grown"), weights(tmp_path / "out")
    changed = {name for name, value in trained.items() if not torch.equal(value, grown[name])}
    assert changed and all(".4." in name for name in changed)

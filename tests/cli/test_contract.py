"""The public contract of the command line: files, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import liar_ext
from liar_ext.allocation import ALLOCATIONS
from liar_ext.cli import main
from liar_ext.criteria import CRITERIA
from liar_ext.reconstruction import RECONSTRUCTIONS

PRUNE = ["--samples", "32", "--seq-len", "32", "--sparsity", "0.5"]


def _json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def _prune(inputs, out: Path, *options: str) -> int:
    source, text = (
        (inputs.llama, inputs.text) if "--bert" not in options else (inputs.bert, inputs.stsb)
    )
    rest = [option for option in options if option != "--bert"]
    return main(
        ["prune", str(source), "--out", str(out), "--calibration", str(text), *PRUNE, *rest]
    )


def test_prune_writes_the_files_of_the_contract_and_stock_loads_them(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    assert _prune(inputs, out, "--json") == 0
    report = _json(capsys)
    written = {path.name for path in out.iterdir()}
    assert written >= {
        "config.json",
        "model.safetensors",
        "liar_report.json",
        "recipe.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "temporary folders remain"
    assert report["out"] == str(out)
    assert report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert {site["kind"] for site in report["sites"]} == {"ffn"}
    assert report["calibration"]["sha256"]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.intermediate_size == 24


def test_prune_again_from_the_recipe_gives_the_same_bytes(inputs, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    assert _prune(inputs, first, "--target", "ffn,heads", "--criterion", "flap") == 0
    recipe = str(first / "recipe.json")
    assert main(["prune", str(inputs.llama), "--out", str(second), "--recipe", recipe]) == 0
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_an_option_wins_over_the_recipe_file(inputs, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"sparsity": 0.25, "calibration": str(inputs.text)}))
    options = ["--recipe", str(recipe), "--sparsity", "0.5", "--samples", "32", "--seq-len", "32"]
    assert main(["prune", str(inputs.llama), "--out", str(tmp_path / "o"), *options, "--json"]) == 0
    assert _json(capsys)["recipe"]["sparsity"] == 0.5


def test_overwrite_replaces_what_prune_wrote_and_nothing_else(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    out.mkdir()
    (out / "precious").write_text("mine")
    for options in ((), ("--overwrite",)):
        assert _prune(inputs, out, *options) == 2
        assert capsys.readouterr().err.startswith("error: --out ")
        assert (out / "precious").read_text() == "mine"
    (out / "precious").rename(out / "liar_report.json")
    assert _prune(inputs, out) == 2
    assert (out / "liar_report.json").read_text() == "mine"
    assert _prune(inputs, out, "--overwrite") == 0
    assert (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_dry_run_and_plan_write_nothing(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    assert _prune(inputs, out, "--dry-run", "--json") == 0
    planned = _json(capsys)
    assert list(tmp_path.iterdir()) == []
    arguments = ["plan", str(inputs.llama), "--calibration", str(inputs.text), *PRUNE, "--json"]
    assert main(arguments) == 0
    assert _json(capsys).keys() == planned.keys()


def test_eval_measures_dense_and_pruned_and_report_shows_both(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    assert _prune(inputs, out) == 0
    capsys.readouterr()
    files = []
    for name, folder in (("dense", inputs.llama), ("pruned", out)):
        options = ["--text", str(inputs.other), "--seq-len", "32", "--json"]
        assert main(["eval", str(folder), *options]) == 0
        text = capsys.readouterr().out
        result = json.loads(text.strip().splitlines()[-1])
        assert result["metric"] == "perplexity"
        assert 1 < result["value"] < 1000
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(text)
    assert main(["report", str(out), *(f"--evaluation={file}" for file in files)]) == 0
    html = (out / "report.html").read_text()
    assert "perplexity" in html
    assert "<svg" in html or "data:image/png" in html


def test_eval_of_the_first_windows(inputs, capsys):
    """The default is all; `--windows` of a text is as `liar compare --eval-windows`."""
    from liar_ext.demo import HELDOUT, MODEL

    options = ["eval", str(MODEL), "--seq-len", "64", "--json"]
    assert main([*options, "--text", str(HELDOUT), "--windows", "2"]) == 0
    assert _json(capsys)["tokens"] == 2 * 63
    for wrong in (["--text", str(HELDOUT), "--windows", "0"], ["--stsb", "x", "--windows", "2"]):
        assert main([*options, *wrong]) == 2
        assert "--windows" in capsys.readouterr().err


def test_eval_of_an_encoder_is_a_spearman_correlation(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    assert _prune(inputs, out, "--bert", "--target", "heads", "--samples", "60") == 0
    capsys.readouterr()
    assert main(["eval", str(out), "--stsb", str(inputs.stsb), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert result["metric"] == "spearman"
    assert -100 <= result["value"] <= 100
    # it was calibrated on that very file
    assert "warning: " in captured.err


def test_env_lists_versions_backends_and_models(capsys):
    assert main(["env", "--json"]) == 0
    result = _json(capsys)
    assert result["torch"] == torch.__version__
    assert result["liar_ext"] == liar_ext.__version__
    assert {"llama", "bert", "gpt2"} <= set(result["models"])
    for status in result["backends"]:
        assert status["available"] or status["reason"], "an unusable backend must say why"


def test_what_env_advises_can_be_copied(capsys, monkeypatch):
    from liar_ext.ops.backends import Status, describe

    why = "triton is not installed: pip install 'liar-ext[triton]'"
    found = [Status(status.op, status.backend, False, why) for status in describe()]
    monkeypatch.setattr("liar_ext.ops.backends.describe", lambda: found)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["env"]) == 0
    assert "'liar-ext[triton]'" in capsys.readouterr().out


def test_a_pruned_folder_with_its_own_layout_is_not_pruned_again(inputs, tmp_path, capsys):
    out = tmp_path / "small"
    assert _prune(inputs, out, "--bert", "--target", "heads", "--samples", "60") == 0
    capsys.readouterr()
    again = ["prune", str(out), "--out", str(tmp_path / "x"), "--calibration", str(inputs.stsb)]
    assert main(again) == 2
    assert "start from the dense one" in capsys.readouterr().err


def test_help_names_every_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")  # names are not broken at their hyphens
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    words = set(capsys.readouterr().out.replace(",", " ").split())
    for registry in (CRITERIA, ALLOCATIONS, RECONSTRUCTIONS):
        assert set(registry) <= words

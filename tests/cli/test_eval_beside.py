"""`liar eval --dense` and `--against`: both rows, paired differences, one JSON object."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from liar_choices import RECORDS, write_jsonl

from liar_ext.checkpoint.load import load
from liar_ext.cli import main
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.evaluation import beside
from liar_ext.evaluation.perplexity import tokenize, window_losses

SIZES = ["--samples", "32", "--seq-len", "32", "--sparsity", "0.5"]


@pytest.fixture(scope="module")
def small(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "small"
    place = ["--out", str(out), "--calibration", str(inputs.text)]
    assert main(["prune", str(inputs.llama), *place, *SIZES]) == 0
    return out


@pytest.fixture(scope="module")
def other_bert(inputs, tmp_path_factory):
    """With weights that rank pairs otherwise."""
    out = tmp_path_factory.mktemp("other") / "bert"
    shutil.copytree(inputs.bert, out)
    model = load(inputs.bert)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(out)
    return out


def evaluated(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def losses(folder, text):
    ids = tokenize(text.read_text(), load_tokenizer(folder))
    return window_losses(load(folder), ids, 32).numpy()


def test_differences_of_perplexities_are_paired_by_window(inputs, small, capsys):
    given = ["--text", inputs.other, "--seq-len", "32"]
    result = evaluated(capsys, small, *given, "--dense", inputs.llama)
    alone = [evaluated(capsys, folder, *given) for folder in (small, inputs.llama)]
    for own, other in zip((result, result["dense"]), alone, strict=True):
        assert own["value"] == other["value"] == other["perplexity"]
        assert own["confidence_interval"] == other["confidence_interval"]
    found = result["difference"]["perplexity"]
    assert found["paired"] is True
    assert found["value"] == pytest.approx(alone[0]["value"] - alone[1]["value"])
    pruned, dense = (losses(folder, inputs.other) for folder in (small, inputs.llama))
    change = np.exp(pruned.mean()) * pruned - np.exp(dense.mean()) * dense
    assert found["standard_error"] == pytest.approx(change.std(ddof=1) / len(change) ** 0.5)


def test_several_measurements_are_one_object_and_one_table(inputs, small, tmp_path, capsys):
    questions = write_jsonl(tmp_path / "q.jsonl", *[RECORDS["plain"]] * 3)
    given = ["--text", inputs.other, "--text", f"ptb={inputs.text}", "--choices", questions]
    given += ["--seq-len", "48", "--dense", inputs.llama]
    result = evaluated(capsys, small, *given)
    assert [one["metric"] for one in result["evaluations"]] == ["perplexity"] * 2 + ["accuracy"]
    protocol = result["evaluations"][1]["protocol"]
    assert (protocol["name"], protocol["join"], protocol["documents"]) == ("ptb", " ", 300)
    assert protocol["seq_len_from"] == "as asked for"
    assert set(result["evaluations"][2]["difference"]) == {
        "accuracy",
        "accuracy_norm",
        "accuracy_ppl",
    }
    assert main(["eval", str(small), *map(str, given)]) == 0
    captured = capsys.readouterr().out
    rows = [line.split() for line in captured.splitlines()]
    assert sum("dense" in row for row in rows) == 1 + 1 + 3 + 1, "a row each, and the head"
    assert "other.txt: " in captured and "protocol ptb" in captured
    assert not set("│┃━") & set(captured), "no borders where it is no terminal"
    # and the page shows both
    file = tmp_path / "found.json"
    file.write_text(json.dumps(result))
    assert main(["report", str(small), f"--evaluation={file}"]) == 0
    page = (small / "report.html").read_text()
    assert "llama (dense)" in page and page.count("ptb=") + page.count("text.txt") > 1


def test_a_length_that_was_not_asked_for_is_said(inputs, small, capsys):
    result = evaluated(capsys, small, "--text", inputs.other)
    assert (result["seq_len"], result["protocol"]["seq_len_from"]) == (64, "the model's limit")


@pytest.mark.parametrize("options", [[], ["--one-at-a-time"]])
def test_against_has_divergence_agreement_and_both_perplexities(
    inputs, small, tmp_path, capsys, options
):
    given = ["--text", inputs.other, "--seq-len", "32", "--against", inputs.llama, *options]
    result = evaluated(capsys, small, *given, *(["--scratch", tmp_path] if options else []))
    assert (result["metric"], result["against"]) == ("kl", str(inputs.llama))
    assert result["value"] > 0 and 0 <= result["estimates"]["top1_agreement"]["value"] <= 100
    beside = evaluated(capsys, small, *given[:4], "--dense", inputs.llama)
    assert result["perplexity"] == pytest.approx(beside["value"])
    dense = result["reference"]["perplexity"]["value"]
    assert dense == pytest.approx(beside["dense"]["value"])
    assert result["difference"]["perplexity"]["standard_error"] == pytest.approx(
        beside["difference"]["perplexity"]["standard_error"]
    )
    assert not any(tmp_path.iterdir()), "states on disk are removed"
    assert main(["eval", str(small), *map(str, given)]) == 0
    assert "KL from dense, nats/token" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--dense"], ["--one-at-a-time", "--against"]])
def test_one_model_is_in_memory_at_a_time(inputs, small, capsys, monkeypatch, given):
    loaded = []

    def watched(folder, **options):
        gc.collect()
        assert all(reference() is None for reference in loaded), "the one before is still there"
        model = load(folder, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(beside, "load", watched)
    evaluated(capsys, small, "--text", inputs.other, *given, inputs.llama)
    assert len(loaded) == 2


def test_sentence_embeddings_are_compared_pair_by_pair(inputs, other_bert, capsys):
    result = evaluated(capsys, other_bert, "--stsb", inputs.stsb, "--dense", inputs.bert)
    change = result["difference"]["spearman"]
    assert change["paired"] is True and change["standard_error"] > 0
    assert change["value"] == pytest.approx(result["value"] - result["dense"]["value"])


def test_a_grid_has_divergences(inputs, tmp_path, capsys):
    fixed = ["--samples", "24", "--seq-len", "32", "--batch-size", "4", "--sparsities", "0.25,0.5"]
    measured = ["--eval", f"kl={inputs.other}", "--eval", f"text=ptb={inputs.other}"]
    place = ["--out", str(tmp_path / "grid"), "--calibration", str(inputs.text)]
    assert main(["compare", str(inputs.llama), *place, *fixed, *measured]) == 0
    result = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    name = f"kl={inputs.other}"
    assert abs(result["dense"]["metrics"][name]["value"]) < 1e-6
    first, second = (cell["metrics"][name]["value"] for cell in result["cells"])
    assert 0 < first < second


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{llama}", "--against", "{llama}"], "--against: is of --text"),
        (["{llama}", "--text", "{text}", "--against", "{bert}"], "a bert model is evaluated with"),
        (["{llama}", "--text", "{text}", "--dense", "{bert}"], "a bert model is evaluated with"),
        (
            ["{llama}", "--text", "{text}", "--dense", "{llama}", "--against", "{llama}"],
            "both name the dense model",
        ),
        (["{llama}", "--text", "{text}", "--one-at-a-time"], "are of --against only"),
        (["{llama}", "--text", "{text}", "--text", "{text}"], "text.txt: is given twice"),
        (
            ["{llama}", "--text", "{text}", "--against", "{llama}", "--scratch", "no/such"],
            "--scratch no/such: no such folder",
        ),
        (["{llama}", "--text", "wikitext9=x"], "wikitext9=x: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_compared_is_one_line(inputs, capsys, arguments, says):
    places = {name: str(getattr(inputs, name)) for name in ("llama", "bert", "text")}
    assert main(["eval", *(argument.format(**places) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line

"""`liar eval` reads a source once: for both models, and to know whether it was calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from liar_choices import RECORDS, write_jsonl

from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.evaluation import beside
from liar_ext.evaluation.task import Evaluation

SIZES = ["--samples", "16", "--seq-len", "16", "--sparsity", "0.5"]


@pytest.fixture(scope="module")
def pruned(inputs, tmp_path_factory):
    """Both kinds of model, and the files that they were calibrated on."""
    root = tmp_path_factory.mktemp("pruned")
    # what STS-B's sentences are of is the calibration of the encoder
    for name, text in (("llama", inputs.text), ("bert", inputs.stsb)):
        place = ["--out", str(root / name), "--calibration", str(text)]
        assert main(["prune", str(getattr(inputs, name)), *place, *SIZES]) == 0
    return root


@pytest.mark.parametrize("kind", ["text", "kl", "stsb", "choices"])
def test_a_source_may_be_gone_once_it_is_read(inputs, pruned, tmp_path, monkeypatch, capsys, kind):
    name = "bert" if kind == "stsb" else "llama"
    file = tmp_path / ("a.csv" if kind == "stsb" else "a.txt")
    file.write_bytes((inputs.stsb if kind == "stsb" else inputs.text).read_bytes())
    if kind == "choices":
        file = Path(write_jsonl(tmp_path / "q.jsonl", *[RECORDS["plain"]] * 3))
    opened = []
    plain, load = Path.read_bytes, beside.load

    def read_bytes(self):
        opened.append(self)
        return plain(self)

    def without(*given, **how):
        # what comes now is measured
        file.unlink(missing_ok=True)
        return load(*given, **how)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(beside, "load", without)
    option = "--text" if kind == "kl" else f"--{kind}"
    other = "--against" if kind == "kl" else "--dense"
    given = [option, str(file), other, str(getattr(inputs, name)), "--seq-len", "16", "--json"]
    assert main(["eval", str(pruned / name), *given]) == 0
    captured = capsys.readouterr()
    assert opened.count(file) == 1
    assert json.loads(captured.out.strip().splitlines()[-1])["difference"]
    same = f"{file} is the text the model was calibrated on"
    assert (same in captured.err) is (kind != "choices")
    assert "is not known" not in captured.err


@pytest.mark.parametrize("kind", ["text", "stsb"])
def test_a_measure_that_is_given_what_was_read_reads_nothing(inputs, tmp_path, kind):
    file = tmp_path / "source"
    file.write_bytes((inputs.stsb if kind == "stsb" else inputs.text).read_bytes())
    evaluation = Evaluation(kind, str(file), 16)
    tokenizer = load_tokenizer(inputs.bert if kind == "stsb" else inputs.llama)
    source, key = evaluation.read(), evaluation.on(tokenizer).key
    file.unlink()
    assert evaluation.on(tokenizer, source).key == key
    with pytest.raises(InputError):
        evaluation.on(tokenizer)

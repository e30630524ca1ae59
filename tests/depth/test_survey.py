"""`liar layers`: from a checkpoint, what the methods go by, and nothing written."""

from __future__ import annotations

import json

import pytest
from liar_depth import build
from liar_families import batches_of, tree_hash, write_tokens

from liar_ext import Recipe
from liar_ext.cli import main
from liar_ext.depth.choice import measure
from liar_ext.engine.clock import Clock
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.store import InMemory
from liar_ext.evaluation.mode import inference


@pytest.fixture
def given(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    tokens = str(write_tokens(tmp_path / "t.npy"))
    return ["layers", str(tmp_path / "dense"), "--calibration", tokens, "--seq-len", "24"]


@pytest.mark.parametrize("place", ["device", "disk"])
def test_measures_are_those_that_methods_go_by(tmp_path, given, capsys, place):
    before = tree_hash(tmp_path)
    names = "influence,angle,loss,taylor,magnitude-l2"
    asked = ["--measures", names, "--spans", "1,3,6", "--hidden-states", place, "--json"]
    assert main([*given, *asked]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tree_hash(tmp_path) == before
    assert list(found["measured"]) == names.split(",")
    model = build("llama")
    recipe = Recipe(calibration=str(tmp_path / "t.npy"), seq_len=24)
    tokens = batches_of(recipe, decoder=True)
    runtime = Runtime(InMemory(model), model.device, Clock(model.device))
    with inference(model):
        for name, spans in found["measured"].items():
            for span, values in spans.items():
                own = measure(name, runtime, recipe, tokens, int(span))
                assert len(values) == 6 - int(span) + 1
                assert values == pytest.approx(own, rel=1e-4)
    assert list(found["measured"]["angle"]) == ["1", "3", "6"]


def test_the_table_marks_the_least(given, capsys):
    assert main([*given, "--spans", "2"]) == 0
    said, head, *rows = capsys.readouterr().out.splitlines()
    assert "low can go" in said
    assert head.split() == ["layer", "influence/2", "angle/2"]
    assert len(rows) == 6
    assert sum(row.count("*") for row in rows) == 2
    assert rows[-1].split() == ["5"], "no span of two begins at the last layer"


def test_sizes_need_no_text(given, capsys):
    asked = [*given[:2], "--measures", "magnitude-l1,magnitude-l2"]
    assert main(asked) == 0
    assert main([*asked[:-1], "influence"]) == 2
    assert "--calibration is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--measures", "size"], "--measures size: choose from influence, angle"),
        (["--measures", ","], "--measures (empty)"),
        (["--spans", "7"], "--spans 7: the model has 6 layers"),
        (["--spans", "0"], "--spans 0: the model has 6 layers"),
        (["--spans", "x"], "--spans x: must be whole numbers"),
    ],
)
def test_bad_input_is_one_line(given, capsys, options, words):
    assert main([*given, *options]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line

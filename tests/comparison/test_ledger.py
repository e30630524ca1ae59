"""The folder of a comparison: what a kill leaves, and who may write there."""

from __future__ import annotations

import json

import pytest

from liar_ext import InputError
from liar_ext.comparison.ledger import CELLS, IDENTITY, Ledger, open_ledger

WHAT = {"recipe": {"samples": 3}, "evaluations": {"text=a": {"sha256": "1"}}}


def _open(tmp_path, identity=WHAT, *, resume=False, overwrite=False):
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    return open_ledger(tmp_path / "out", source, identity, resume=resume, overwrite=overwrite)


def test_entries_are_found_again_and_a_half_written_line_is_none(tmp_path):
    with _open(tmp_path) as ledger:
        ledger.add_dense({"parameters": 7})
        ledger.add({"key": "a", "status": "done"})
        ledger.add({"key": "b", "status": "failed"})
    path = tmp_path / "out" / CELLS
    before = path.read_bytes()
    path.write_bytes(before + b'{"key": "c", "sta')
    with _open(tmp_path, resume=True) as ledger:
        assert ledger.dense is not None and ledger.dense["parameters"] == 7
        assert ledger.done("a")
        assert not ledger.done("b"), "what failed is tried again"
        assert not ledger.done("c")
        assert path.read_bytes() == before
        ledger.add({"key": "b", "status": "done"})
        assert ledger.done("b")
    assert Ledger(tmp_path / "out").done("b"), "the last entry of a key is the one that counts"


def test_a_damaged_line_is_named(tmp_path):
    with _open(tmp_path) as ledger:
        ledger.add({"key": "a", "status": "done"})
    with (tmp_path / "out" / CELLS).open("a") as file:
        file.write("rubbish\n")
    with (
        pytest.raises(InputError, match="cells.jsonl: line 2 is damaged"),
        _open(tmp_path, resume=True),
    ):
        pass


def test_another_identity_is_refused_by_name_and_changes_nothing(tmp_path):
    with _open(tmp_path) as ledger:
        ledger.add({"key": "a", "status": "done"})
    other = {**WHAT, "recipe": {"samples": 4}}
    with (
        pytest.raises(InputError, match="--resume: recipe.samples is 4, and 3 in"),
        _open(tmp_path, other, resume=True),
    ):
        pass
    with _open(tmp_path, resume=True) as ledger:
        assert ledger.done("a")


def test_a_comparison_is_not_replaced_silently_and_nothing_else_ever(tmp_path):
    with _open(tmp_path) as ledger:
        ledger.add({"key": "a", "status": "done"})
    with (
        pytest.raises(InputError, match="--resume goes on with it, --overwrite starts"),
        _open(tmp_path),
    ):
        pass
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with _open(tmp_path, {**WHAT, "recipe": {"samples": 4}}, overwrite=True) as ledger:
        assert not ledger.entries
        ledger.add({"key": "a", "status": "done"})
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert (
        json.loads((tmp_path / "out" / IDENTITY).read_text())["identity"]["recipe"]["samples"] == 4
    )
    (tmp_path / "out" / IDENTITY).unlink()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="holds other things"), _open(tmp_path, **flags):
            pass
    with (
        pytest.raises(InputError, match="give one of them"),
        _open(tmp_path, resume=True, overwrite=True),
    ):
        pass


def test_two_processes_do_not_write_one_folder(tmp_path):
    with _open(tmp_path) as ledger:
        ledger.add({"key": "a", "status": "done"})
        with pytest.raises(InputError, match="another process"), _open(tmp_path, resume=True):
            pass
    with _open(tmp_path, resume=True) as ledger:
        assert ledger.done("a")


def test_an_error_before_the_first_entry_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="early"), _open(tmp_path):
        raise ValueError("early")
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(InputError, match="overlaps the source"),
        open_ledger(
            tmp_path / "source" / "out", tmp_path / "source", WHAT, resume=False, overwrite=False
        ),
    ):
        pass

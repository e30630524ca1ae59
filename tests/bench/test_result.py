"""Where `liar bench` writes: refused before anything is measured, and replaced whole."""

from __future__ import annotations

import json
import os

import pytest
import torch

from liar_ext.bench import BENCHMARKS
from liar_ext.bench.result import check_file, head, write_result
from liar_ext.cli import main
from liar_ext.demo import MODEL
from liar_ext.errors import InputError

WITH_SOURCE = ("latency", "prune", "methods", "serve")


def measures(*words, **more):
    raise AssertionError("it was measured")


@pytest.mark.parametrize("where", [".", "none/r.json"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_place_that_cannot_be_written_is_refused_first(
    name, where, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(f"{BENCHMARKS[name].module}.execute", measures)
    option, place = BENCHMARKS[name].file, str(tmp_path / where)
    source = [str(MODEL)] if name in WITH_SOURCE else []
    assert main(["bench", name, *source, option, place]) == 2
    says = "is a folder; name a file in it" if where == "." else "is not a folder"
    assert capsys.readouterr().err.startswith(f"error: {option} {place}: ")
    with pytest.raises(InputError, match=says):
        check_file(option, place)


def test_the_table_of_tune_needs_a_place_as_well(tmp_path, capsys):
    assert main(["bench", "tune", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: is a folder; name a file in it" in capsys.readouterr().err


def test_a_file_is_old_or_new_whatever_happens(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    write_result("--json", str(file), {"a": 1})

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="--json .*r.json: cannot be written .*No space left"):
        write_result("--json", str(file), {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_pipes_devices_and_links_stay_what_they_are(tmp_path):
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    link.symlink_to(file)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (pipe, link):
            check_file("--json", str(path))
            write_result("--json", str(path), {"a": 1})
        assert json.loads(os.read(reader, 100)) == {"a": 1}
    finally:
        os.close(reader)
    assert pipe.is_fifo() and link.is_symlink()
    assert json.loads(file.read_text()) == {"a": 1}


def test_results_begin_alike():
    before = {"load_1min": 1.0}
    found = head("name", torch.device("cpu"), before)
    assert list(found) == ["benchmark", "device", "date", "environment", "machine"]
    assert found["machine"]["before"] == before
    assert {"load_1min", "cores"} <= set(found["machine"]["after"])
    assert head("name", torch.device("cpu"), before, "quiet")["note"] == "quiet"

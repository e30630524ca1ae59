"""`liar bench tune`: what it asks of the tuner, and its refusals."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from liar_ext import kernels
from liar_ext.bench import BENCHMARKS, tune
from liar_ext.bench import result as results
from liar_ext.errors import InputError


def execute(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    BENCHMARKS["tune"].add_arguments(parser)
    return BENCHMARKS["tune"].execute(parser.parse_args(words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match="on a GPU, and torch sees no CUDA device"):
        execute()


ROW = {"kernel": "pointer", "dtype": "float16", "columns": 8, "config": {"block": 64, "a": None}}
ROWS = [
    ROW | {"ms": 0.12345678, "best": True, "error": 1e-7, "reason": None},
    ROW | {"ms": None, "best": False, "error": float("inf"), "reason": "not timed"},
    ROW | {"columns": 16, "ms": None, "best": False, "error": None, "reason": "no room"},
]


@pytest.fixture
def pretended(monkeypatch):
    """A GPU and a tuner that remembers what it was asked."""
    asked = []

    def run(sizes, tokens, dtypes, out):
        asked.append((sizes, tokens, dtypes, out))
        return ROWS

    tuner = SimpleNamespace(tune=run, device_file=lambda device: Path("some_gpu.json"))
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "find_spec", lambda name: True)
    monkeypatch.setattr(results, "environment", lambda device: {"device": str(device)})
    monkeypatch.setattr(results, "machine_state", dict)
    monkeypatch.setattr(tune, "machine_state", dict)
    monkeypatch.setitem(sys.modules, "liar_ext.kernels.tune", tuner)
    monkeypatch.setattr(kernels, "tune", tuner, raising=False)
    return asked


def test_it_passes_its_options_on_and_prints_the_rows(pretended, capsys, tmp_path):
    out = tmp_path / "configs.json"
    words = ["--sizes", "8", "16", "--tokens", "32", "--dtypes", "float16", "--out", str(out)]
    result = execute(*words)
    assert pretended == [([8, 16], 32, [torch.float16], out)]
    assert result["benchmark"] == "tune"
    assert result["problems"] == ["no right candidate for pointer float16 n=16"]
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "     8 float16   pointer    block 64: 0.1235 ms best error 1.0e-07",
        "     8 float16   pointer    block 64: not timed",
        "    16 float16   pointer    block 64: no room",
    ]
    assert "some_gpu.json" in printed[3]


def test_sizes_below_one_are_refused(pretended):
    with pytest.raises(InputError, match="must be positive"):
        execute("--sizes", "0")
    assert pretended == []

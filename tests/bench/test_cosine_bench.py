"""`liar bench cosine`: what a row holds, and that a wrong version has no speed."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from liar_ext.bench import BENCHMARKS, cosine, measure
from liar_ext.cli import main
from liar_ext.errors import InputError
from liar_ext.ops import backends

SMALL = ["--sizes", "40", "--tokens", "33", "--dtypes", "bfloat16", "--repeats", "2"]
SMALL += ["--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)


def execute(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    BENCHMARKS["cosine"].add_arguments(parser)
    return BENCHMARKS["cosine"].execute(parser.parse_args([*SMALL, *words]))


def by_name(rows):
    return {(row["variant"], row["case"]): row for row in rows}


def replaced(monkeypatch, run):
    right = backends._REGISTRY["cosine"]["torch"].run
    made = backends.Implementation("cosine", "torch", lambda *a: run(right, *a), backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["cosine"], "torch", made)


def test_each_variant_has_a_row_beside_the_library(capsys):
    result = execute("--backends", "torch", "reference")
    rows = by_name(result["rows"])
    library = [cosine.BASELINE, cosine.COPIED, cosine.PAIRS]
    ours = [(name, case) for name in ("torch", "reference") for case in ("all", "half")]
    assert list(rows) == [*((name, "all") for name in library), *ours]
    copied = result["ceilings"]["copy_gbytes"]
    for (name, case), row in rows.items():
        assert row["ok"]
        assert row["ours"] == (name not in library)
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        needed = 2 * (33 if case == "all" else 17) * 40 * 2
        assert row["gbytes"] == pytest.approx(needed / row["ms"] / 1e6, rel=1e-3)
        assert row["bandwidth"] == pytest.approx(row["gbytes"] / copied, rel=1e-2, abs=1e-4)
        assert row["peak_bytes"] is None
        assert ("ratio" in row) == (case == "all")
        assert ("overhead" in row) == (case == "half")
    assert rows[cosine.BASELINE, "all"]["ratio"] == 1.0
    # the library rounds to 16 bits, unless it is given copies; ours does neither
    assert rows[cosine.BASELINE, "all"]["error"] > 1e-4
    assert rows[cosine.COPIED, "all"]["error"] < 1e-6
    assert all(rows[key]["error"] <= rows[key]["bound"] < 1e-5 for key in ours)
    assert [key for key in ours if rows[key]["chosen"]] == ours[:2]
    assert result["problems"] == []
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr().out
    assert "diagonal of all pairs" in printed
    assert "unmeasured GPU cosines, bfloat16, d = 4096" in printed


def test_float32_needs_no_copies():
    rows = by_name(execute("--dtypes", "float32", "--backends", "torch")["rows"])
    assert (cosine.COPIED, "all") not in rows
    assert rows[cosine.BASELINE, "all"]["error"] < 1e-6


def test_the_matrix_of_all_pairs_is_left_out_where_it_is_too_large(monkeypatch, capsys):
    monkeypatch.setattr(cosine, "PAIRS_BYTES", 3 * 33**2 * 2 - 1)
    row = by_name(execute("--backends", "torch")["rows"])[cosine.PAIRS, "all"]
    assert "ms" not in row
    assert "matrices of 33 tokens take 0 MiB" in row["reason"]
    assert "not run: its matrices" in capsys.readouterr().out


def test_a_wrong_version_has_no_speed_and_costs_the_others_none(monkeypatch, tmp_path, capsys):
    replaced(monkeypatch, lambda right, x, y, valid: right(x, y, valid) * (1 - 1e-5))
    file = tmp_path / "result.json"
    command = ["bench", "cosine", *SMALL, "--backends", "reference", "torch"]
    assert main([*command, "--json", str(file)]) == 1
    output = capsys.readouterr()
    assert "WRONG" in output.out
    assert output.err.startswith("error: torch all bfloat16 d=40 is wrong")
    rows = by_name(json.loads(file.read_text())["rows"])
    assert "ms" in rows["reference", "all"]
    for case in ("all", "half"):
        wrong = rows["torch", case]
        assert not wrong["ok"]
        assert wrong["error"] > wrong["bound"]
        assert not {"ms", "gbytes", "ratio", "overhead", "bandwidth"} & set(wrong)


def test_rows_that_are_not_among_the_timed_ones_count_too(monkeypatch):
    """The self-test's: zeros, what is not finite, and what float32 squares do not hold."""
    replaced(monkeypatch, lambda right, x, y, valid: right(x, y, valid).nan_to_num(0.0))
    row = by_name(execute("--backends", "torch")["rows"])["torch", "all"]
    assert (row["ok"], row["error"]) == (False, cosine.WRONG)
    assert "ms" not in row


def test_a_version_that_raises_is_named_and_the_others_are_measured(monkeypatch):
    def fails(right, *_):
        raise RuntimeError("no such instruction")

    replaced(monkeypatch, fails)
    result = execute("--backends", "torch", "reference")
    assert result["problems"] == [
        f"torch {case} bfloat16 d=40 failed: RuntimeError: no such instruction"
        for case in ("all", "half")
    ]
    assert "ms" in by_name(result["rows"])["reference", "all"]


def test_a_shape_that_does_not_fit_costs_the_others_nothing(monkeypatch):
    right = cosine.run

    def limited(columns, *rest):
        if columns == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(columns, *rest)

    monkeypatch.setattr(cosine, "run", limited)
    result = execute("--sizes", "40", "9", "--backends", "torch")
    assert result["problems"] == ["bfloat16 d=40 failed: CUDA out of memory"]
    assert {row["n"] for row in result["rows"]} == {9}


def test_triton_is_measured_when_it_is_asked_for():
    pytest.importorskip("triton")
    if reason := backends.obstacle("cosine", "triton", CPU, torch.bfloat16):
        pytest.skip(f"no interpreted kernels: {reason}")
    assert execute()["absent"]["bfloat16"]["triton"] == "it would be interpreted"
    result = execute("--backends", "triton", "--repeats", "1")
    assert result["problems"] == []
    assert "ms" in by_name(result["rows"])["triton", "half"]


def test_a_backend_that_failed_its_self_test_is_a_problem(monkeypatch):
    def unavailable(device, dtype):
        return "its self-test is wrong: relative error 1e-01, bound 1e-06"

    broken = backends.Implementation("cosine", "triton", lambda *_: None, unavailable)
    monkeypatch.setitem(backends._REGISTRY["cosine"], "triton", broken)
    assert execute()["problems"] == [
        "triton for bfloat16: its self-test is wrong: relative error 1e-01, bound 1e-06"
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "0"], "must be positive"),
        (["--tokens", "-1"], "must be positive"),
        (["--repeats", "0"], "must be positive"),
        (["--dtypes", "float8"], "--dtypes float8: give one of"),
        (["--backends", "cuda"], "--backends cuda cannot run cosine on cpu"),
    ],
)
def test_bad_values_are_refused(words, says):
    with pytest.raises(InputError, match=says):
        execute(*words)


def test_forcing_is_refused_and_leaves_no_trace(backend):
    backend("torch")
    with pytest.raises(InputError, match="runs every version side by side"):
        execute()
    with measure.variable("LIAR_BACKEND", "reference"):
        x = torch.randn(3, 4)
        cosine.Variant("torch", True)(x, x)
        assert backends.forced("cosine") == "reference"

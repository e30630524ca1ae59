"""`liar bench gram`: what a row holds, and that a wrong variant has no speed."""

from __future__ import annotations

import argparse

import pytest

from liar_ext.bench import BENCHMARKS, gram
from liar_ext.errors import InputError, NumericalError
from liar_ext.ops import backends


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    BENCHMARKS["gram"].add_arguments(parser)
    small = ["--sizes", "40", "--tokens", "64", "--dtypes", "float32", "--repeats", "2"]
    return parser.parse_args([*small, "--device", "cpu", *words])


@pytest.fixture
def broken(monkeypatch):
    """A torch backend that forgets to accumulate."""
    wrong = backends.Implementation("gram", "torch", lambda *_: None, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["gram"], "torch", wrong)


def test_each_variant_has_a_row_beside_the_baseline(capsys):
    result = BENCHMARKS["gram"].execute(arguments("--backends", "torch", "reference"))
    baseline, *rows = result["rows"]
    assert baseline["variant"] == gram.BASELINE
    assert baseline["ratio"] == 1.0
    assert [row["variant"] for row in rows] == ["torch", "reference"]
    for row in rows:
        assert row["error"] <= row["bound"]
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["gflops"] == pytest.approx(40 * 40 * 64 / row["ms"] / 1e6, rel=0.2, abs=0.1)
    assert "load_1min" in result["machine"]["before"]
    assert "torch" in capsys.readouterr().out


def test_a_wrong_variant_has_no_speed(broken):
    baseline, row = gram.run([40], 64, ["float32"], ["torch"], repeats=2)
    assert baseline["ok"]
    assert not row["ok"]
    assert row["error"] > row["bound"]
    assert not {"ms", "gflops", "ratio"} & set(row)


def test_a_wrong_variant_fails_the_command(broken, capsys):
    with pytest.raises(NumericalError, match="wrong on torch"):
        BENCHMARKS["gram"].execute(arguments("--backends", "torch"))
    assert "WRONG" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_named_with_the_reason():
    with pytest.raises(InputError, match=r"cuda cannot run gram.*no cuda implementation"):
        BENCHMARKS["gram"].execute(arguments("--backends", "cuda"))


def test_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="must be positive"):
        gram.run([0], 64, ["float32"])

"""`liar bench solve`: known solutions, both kinds of rows, and no speed for a wrong variant."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from liar_ext.bench import BENCHMARKS, measure, solve
from liar_ext.bench.solve_systems import conditioned, systems
from liar_ext.errors import InputError
from liar_ext.ops import backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setitem(measure.CEILING_SIDE, "cpu", 16)
    monkeypatch.setattr(solve, "CONDITIONS", (1e2, 1e10))
    monkeypatch.setattr(solve, "CONDITIONED", (24, 5))


def execute(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    BENCHMARKS["solve"].add_arguments(parser)
    return BENCHMARKS["solve"].execute(parser.parse_args([*words, "--device", "cpu"]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 40, 1)])
def test_the_solution_of_a_made_system_is_known(shape):
    system = systems(*shape, CPU)
    unit = system.matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridged = system.matrix + (system.ridge * unit)[:, None, None] * torch.eye(shape[1])
    assert torch.allclose(ridged, system.ridged, rtol=1e-14)
    solution = torch.linalg.solve(ridged, system.right)
    assert system.forward_error(solution) < 1e-12
    assert system.backward_error(solution) < 1e-15
    assert system.shift_error(system.shift) == 0.0


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_a_conditioned_system_has_its_condition(condition):
    system = conditioned(condition, 65, 3, CPU)
    values = torch.linalg.eigvalsh(system.matrix[0])
    assert float(values[-1] / values[0]) == pytest.approx(condition, rel=1e-6)


def test_errors_see_a_wrong_or_broken_member_of_the_batch():
    system = systems(3, 9, 4, CPU)
    wrong = system.solution.clone()
    wrong[2] *= 1.5
    assert system.forward_error(wrong) == pytest.approx(0.5)
    assert system.backward_error(wrong) > 1e-3
    wrong[1, 0, 0] = torch.nan
    assert system.forward_error(wrong) == 1e30
    assert system.backward_error(wrong) == 1e30


def test_rows_hold_times_errors_and_the_ladder(capsys):
    result = execute("--cases", "2x12", "1x20x3", "--backends", "torch", "--repeats", "2")
    timed = [row for row in result["rows"] if row["kind"] == "time"]
    assert [(row["batch"], row["s"], row["r"]) for row in timed[::6]] == [(2, 12, 12), (1, 20, 3)]
    baseline = timed[0]
    assert baseline["variant"] == solve.BASELINE
    assert baseline["ratio"] == 1.0
    ours = [row for row in timed if row["ours"]]
    assert [row["variant"] for row in ours[:2]] == ["torch float64", "torch float32"]
    for row in timed:
        assert row["ok"]
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
    for row in ours:
        assert row["forward_error"] < 1e-8
        assert row["shift_error"] < 1e-8
        assert row["steps"] == []
        assert row["slowdown"] > 0
        flops = row["batch"] * (row["s"] ** 3 / 3 + 2 * row["s"] ** 2 * row["r"])
        assert row["gflops"] == pytest.approx(flops / row["ms"] / 1e6, rel=1e-3)
    table = {
        (row["condition"], row["variant"], row.get("moments")): row
        for row in result["rows"]
        if row["kind"] == "condition"
    }
    assert table[1e2, "torch float64", "float32"]["forward_error"] < 1e-12
    # at 1e10 float32 Moments say nothing: the ridge is raised, and that is reported
    raised = table[1e10, "torch float64", "float32"]
    assert "raised to" in raised["steps"][-1]
    assert raised["forward_error"] > 1e-3
    assert table[1e10, "torch float64", "float64"]["steps"] == []
    assert result["problems"] == []
    json.dumps(result, allow_nan=False)
    printed = capsys.readouterr().out
    assert "raised to" in printed
    assert "unmeasured GPU solve, 64 × 128²" in printed


def test_a_wrong_variant_has_no_speed(monkeypatch):
    right = backends._REGISTRY["solve"]["torch"].run

    def wrong(*args):
        found = right(*args)
        return found._replace(solution=found.solution * 1.001)

    broken = backends.Implementation("solve", "torch", wrong, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["solve"], "torch", broken)
    result = execute("--cases", "1x9", "--backends", "torch", "--repeats", "1")
    row = next(row for row in result["rows"] if row["ours"])
    assert not row["ok"]
    assert "ms" not in row
    assert "wrong" in result["problems"][0]


def test_a_variant_that_raises_is_named(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image")

    broken = backends.Implementation("solve", "torch", fails, backends.anywhere)
    monkeypatch.setitem(backends._REGISTRY["solve"], "torch", broken)
    result = execute("--cases", "1x9", "--backends", "torch", "--repeats", "1")
    assert "no kernel image" in result["problems"][0]
    assert "ms" in result["rows"][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cases", "12"], "--cases 12: give BxS"),
        (["--cases", "0x12"], "--cases 0x12"),
        (["--cases", "1x2x3x4"], "give BxS"),
        (["--repeats", "-1"], "--repeats -1"),
        (["--backends", "triton"], "--backends triton cannot run solve on cpu"),
    ],
)
def test_bad_values_are_refused(words, says):
    with pytest.raises(InputError, match=says):
        execute(*words)

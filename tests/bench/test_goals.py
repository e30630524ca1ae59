"""Goals: which rows count, and when a figure is reached, missed or unmeasured."""

from __future__ import annotations

import pytest

from liar_ext.bench import BENCHMARKS
from liar_ext.bench.goals import GOALS, Goal, judge, table

SPEED = Goal("speed", "gram", "cuda", {"n": 8}, "ratio", 1.8, True)
COST = Goal("cost", "gram", "cuda", {}, "overhead", 0.02, False)
BIAS = Goal("bias", "gram", None, {}, "bias", 1e-6, False)
SOLVED = Goal("solved", "solve", None, {}, "forward_error", 1e-6, False)


def result(*rows, device="cuda"):
    defaults = {"ok": True, "chosen": True, "ours": True, "n": 8, "variant": "triton"}
    return {"benchmark": "gram", "device": device, "rows": [{**defaults, **row} for row in rows]}


@pytest.mark.parametrize(
    ("goal", "rows", "state", "value"),
    [
        (SPEED, [{"ratio": 1.8}], "reached", 1.8),
        (SPEED, [{"ratio": 1.79}], "missed", 1.79),
        (SPEED, [{"ratio": 2.5}, {"ratio": 1.2}], "missed", 1.2),
        (SPEED, [{"ratio": 2.5}, {"ratio": 1.9}], "reached", 1.9),
        (SPEED, [{"ratio": 2.5, "n": 9}], "unmeasured", None),
        (SPEED, [{"ratio": 2.5, "chosen": False}], "unmeasured", None),
        (SPEED, [{"ratio": 2.5, "ok": False}], "unmeasured", None),
        (COST, [{"overhead": -0.3}], "reached", -0.3),
        (COST, [{"overhead": 0.01}, {"overhead": 0.03}, {"overhead": -0.5}], "missed", 0.03),
        (BIAS, [{"bias": -2e-6}, {"bias": 1e-9}], "missed", 2e-6),
        (SOLVED, [{"forward_error": 1e-9}, {"forward_error": 0.5}], "missed", 0.5),
        (
            SOLVED,
            [{"forward_error": 1e-9}, {"forward_error": 0.5, "steps": ["raised"]}],
            "reached",
            1e-9,
        ),
    ],
)
def test_the_furthest_row_decides(goal, rows, state, value):
    verdict = judge(goal, result(*rows))
    assert (verdict.state, verdict.value) == (state, value)


def test_another_kind_of_device_or_no_result_measures_nothing():
    assert judge(SPEED, result({"ratio": 9.0}, device="cpu")).state == "unmeasured"
    assert judge(SPEED, None).state == "unmeasured"
    assert judge(BIAS, result({"bias": 0.0}, device="cpu")).state == "reached"


def test_a_forced_variant_that_does_better_is_named_but_does_not_count():
    found = judge(
        SPEED,
        result(
            {"ratio": 1.5},
            {"ratio": 1.9, "chosen": False, "variant": "cuda"},
            {"ratio": 2.9, "chosen": False, "ours": False, "variant": "quack"},
        ),
    )
    assert found.state == "missed"
    assert found.best == "cuda 1.90"


def test_every_goal_names_a_benchmark_and_is_printed_once():
    assert {goal.benchmark for goal in GOALS} <= set(BENCHMARKS)
    names = [(goal.line, goal.metric, goal.device) for goal in GOALS]
    assert len(set(names)) == len(names)
    printed = table({"benchmark": "gram", "device": "cpu", "rows": []}).splitlines()
    assert len(printed) == 1 + sum(goal.benchmark == "gram" for goal in GOALS)
    assert all(line.startswith("  unmeasured") for line in printed[1:])

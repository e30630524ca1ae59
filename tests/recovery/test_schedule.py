"""The learning rate, and which windows a step has."""

from __future__ import annotations

import pytest

from liar_ext import InputError
from liar_ext.recovery import Schedule


def test_the_rate_rises_to_its_height_and_falls_by_a_cosine_to_its_floor():
    plan = Schedule(104, learning_rate=1.0, warmup=4, floor=0.2)
    assert [plan.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert plan.rate(54) == pytest.approx(0.6)
    assert plan.rate(103) == pytest.approx(0.2, abs=1e-3)
    assert plan.rate(104) == pytest.approx(0.2)
    # 3 % of all, at least one
    assert Schedule(100).rate(2) == Schedule(100).learning_rate
    assert Schedule(100).rate(1) < Schedule(100).learning_rate
    assert Schedule(5, warmup=0).rate(0) == 2e-4


def test_every_window_is_seen_before_any_is_seen_again():
    plan = Schedule(10, batch_size=2, accumulation=2, seed=3)
    order = plan.order(10)
    seen = [window for step in range(5) for forward in order(step) for window in forward]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert all(len(forward) == 2 for step in range(5) for forward in order(step))
    # of its number alone: a run that goes on has not seen the steps before
    assert plan.order(10)(4) == order(4)
    assert Schedule(10, batch_size=2, accumulation=2, seed=4).order(10)(0) != order(0)
    # more windows in a step than there are
    assert {window for forward in plan.order(3)(0) for window in forward} == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"learning_rate": float("nan")}, "--lr nan: must be above 0, at most 1"),
        ({"learning_rate": float("inf")}, "--lr inf"),
        ({"learning_rate": 0.0}, "--lr 0.0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"accumulation": -1}, "--accumulation -1"),
        ({"warmup": -1}, "--warmup -1"),
        ({"floor": 1.5}, "--floor 1.5: must be a fraction"),
        ({"weight_decay": 1.0}, "--weight-decay 1.0"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"clip": 0.0}, "--clip 0.0"),
        ({"evaluate_every": 0}, "--evaluate-every 0"),
        ({"evaluate_every": -2}, "--evaluate-every -2: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be 0 to 4294967295"),
        ({"seed": 2**63 - 1}, "--seed 9223372036854775807: must be 0 to 4294967295"),
        ({"save_every": 0}, "--save-every 0"),
    ],
)
def test_numbers_that_mean_nothing(fields, words):
    with pytest.raises(InputError, match=words):
        Schedule(**{"steps": 3, **fields})


def test_the_largest_seed_draws():
    order = Schedule(10, batch_size=2, seed=2**32 - 1).order(10)
    assert sorted(row for step in range(5) for rows in order(step) for row in rows) == [*range(10)]

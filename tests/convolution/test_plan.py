"""The programme against every plan there is, and what its rounding promises."""

from __future__ import annotations

import math
import random

import pytest

from liar_ext import InputError
from liar_ext.convolution.plan import Option, best_plans, best_plans_reference, fastest


def table(seed, length, *, whole=True):
    """Random options, of times that are whole numbers of steps where asked."""
    draw = random.Random(seed)
    options = []
    for start in range(length):
        for end in range(start + 1, length + 1):
            # as in a network, some segments are not there; single ones are
            if end > start + 1 and draw.random() < 0.4:
                continue
            for kernel in draw.sample((1, 3, 5), draw.choice((1, 2))):
                seconds = draw.randint(0, 20) if whole else draw.random() * 20
                value = round(draw.uniform(-1, 0), 2)
                options.append(Option(start, end, kernel, value, float(seconds)))
    return options


def same(got, expected):
    assert [plan.rank for plan in got] == [
        (pytest.approx(value), pytest.approx(seconds))
        for value, seconds in (plan.rank for plan in expected)
    ]


@pytest.mark.parametrize("top", [1, 4])
@pytest.mark.parametrize("length", [1, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(seed, length, top):
    options = table(seed, length)
    least = fastest(options, length).seconds
    for budget in (least, least + 7, least + 30):
        budget = max(budget, 1.0)
        # a step is a hundredth of a second or less, and times are whole seconds
        got = best_plans(options, length, budget, top=top, steps=int(budget) * 100)
        same(got, best_plans_reference(options, length, budget, top=top))
        assert len({plan.options for plan in got}) == len(got)


def test_rounding_up_never_takes_more_than_the_budget():
    """LayerMerge's repository rounds down: ten segments of 1.9 steps are counted as ten steps."""
    slow = [Option(i, i + 1, 3, 0.0, 1.9) for i in range(10)]
    quick = [Option(i, i + 1, 1, -0.1, 1.0) for i in range(10)]
    floored = sum(math.floor(option.seconds) for option in slow)
    assert floored <= 15 < sum(option.seconds for option in slow)
    (best,) = best_plans([*slow, *quick], 10, 15.0, steps=1500)
    assert best.seconds <= 15.0
    assert best.rank == best_plans_reference([*slow, *quick], 10, 15.0)[0].rank
    for seed in range(20):
        options = table(seed, 7, whole=False)
        budget = fastest(options, 7).seconds * 1.3 + 1
        for plan in best_plans(options, 7, budget, top=3, steps=100):
            assert plan.seconds <= budget * (1 + 1e-9)


def test_equal_plans_are_ordered_by_time():
    options = [
        Option(0, 1, 3, -0.5, 4.0),
        Option(0, 1, 1, -0.5 + 1e-9, 5.0),
        Option(1, 2, 3, 0.0, 1.0),
    ]
    first, second = best_plans(options, 2, 10.0, top=2)
    assert (first.seconds, second.seconds) == (5.0, 6.0)


def test_a_plan_that_fits_in_seconds_alone_is_found():
    """Rounded up, it would take two steps more than there are."""
    options = [Option(0, 1, 3, 0.0, 1 / 3), Option(1, 2, 3, 0.0, 2 / 3)]
    (only,) = best_plans(options, 2, 1.0, steps=100)
    assert only.options == tuple(options)


def test_bad_tables_and_budgets_are_refused():
    options = [Option(0, 1, 3, 0.0, 2.0)]
    with pytest.raises(InputError, match="no plan is within 1000 ms: the fastest takes 2000 ms"):
        best_plans(options, 1, 1.0)
    with pytest.raises(InputError, match="no segments"):
        best_plans(options, 2, 10.0)
    for bad in (Option(0, 1, 3, math.nan, 1.0), Option(0, 1, 3, 0.0, math.inf)):
        with pytest.raises(InputError, match="no importance or no time"):
            best_plans([bad], 1, 10.0)

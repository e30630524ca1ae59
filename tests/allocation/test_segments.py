"""The programme over segments against enumeration, and the search around it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation.search import Candidate, Problem
from liar_ext.allocation.segments import SLOTS, Segment, calls, check, plans, search
from liar_ext.errors import InputError


def _random(layers: int, seed: int) -> list[list[Segment]]:
    """Segments of one layer, and some of more, with whole costs and losses that differ."""
    generator = np.random.default_rng(seed)
    found = []
    for start in range(layers):
        own = [
            Segment(start + 1, float(generator.integers(0, 9)), float(generator.random()), (place,))
            for place in range(3)
        ]
        own += [
            Segment(stop, 0.0, float(generator.random()), (0,) * (stop - start))
            for stop in range(start + 2, min(start + 4, layers) + 1)
        ]
        found.append(own)
    return found


def _every(segments: Sequence[Sequence[Segment]], start: int = 0) -> list[list[Segment]]:
    if start == len(segments):
        return [[]]
    return [[s, *rest] for s in segments[start] for rest in _every(segments, s.stop)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layers", [1, 2, 5, 7])
def test_is_the_best_of_all_ways(layers: int, seed: int) -> None:
    segments, count = _random(layers, seed), 5
    # costs are multiples of a slot
    most = float(SLOTS // 100)
    fitting = [way for way in _every(segments) if sum(s.cost for s in way) <= most]
    wanted = sorted(fitting, key=lambda way: sum(s.loss for s in way))[:count]
    found = plans(segments, most, count)
    assert [sum(s.loss for s in way) for way in found] == pytest.approx(
        [sum(s.loss for s in way) for way in wanted], rel=1e-12
    )
    assert found[0] == wanted[0]
    assert len({tuple(way) for way in found}) == len(found)


def test_a_plan_never_costs_more_than_the_budget() -> None:
    generator = np.random.default_rng(3)
    segments = [
        [Segment(start + 1, float(c), -float(c), (0,)) for c in generator.random(4)]
        for start in range(6)
    ]
    # rounded down, each of the six might hide a slot
    for way in plans(segments, 3.0, 8):
        assert sum(s.cost for s in way) <= 3.0


def test_there_may_be_no_way() -> None:
    assert plans([[Segment(1, 2.0, 0.0, (0,))]], 1.0, 3) == []


class Additive:
    """Losses of single changes add up; `together` of layers that are without units at once."""

    def __init__(self, errors: Sequence[Sequence[float]], levels: Sequence[Sequence[int]]) -> None:
        self.errors, self.levels = errors, levels
        self.asked: list[tuple[Candidate, float]] = []

    def losses(self, candidates: Sequence[Candidate], share: float = 1.0) -> list[float]:
        self.asked += [(c, share) for c in candidates]
        return [self.loss(c) for c in candidates]

    def loss(self, candidate: Candidate) -> float:
        own = zip(candidate, self.errors, self.levels, strict=True)
        return sum(errors[levels.index(units)] for units, errors, levels in own)


def _problem(layers: int, evaluations: int, least: int = 0) -> tuple[Problem, Additive]:
    generator = np.random.default_rng(layers)
    budgets, levels, errors = [], [], []
    for _ in range(layers):
        for kind, units, cost in (("heads", 4, 30), ("ffn", 12, 10)):
            budgets.append(Budget(kind, units, cost, least=least))
            own = [*([] if least else [0]), *range(1, units + 1)]
            levels.append(tuple(own))
            falling = np.sort(generator.random(len(own) - 1))[::-1]
            errors.append([*falling.tolist(), 0.0])
    numbers = [i // 2 for i in range(2 * layers)]
    problem = Problem(budgets, 0.4, levels, evaluations, 0, windows=16, layers=numbers)
    return problem, Additive(errors, levels)


@pytest.mark.parametrize("least", [0, 1])
def test_finds_the_optimum_where_losses_add_up(least: int) -> None:
    problem, oracle = _problem(2, 400, least)
    found = search(problem, oracle)
    assert problem.price(found) <= problem.most
    every = itertools.product(*problem.levels)
    best = min(oracle.loss(c) for c in every if problem.price(c) <= problem.most)
    assert oracle.loss(found) == pytest.approx(best, rel=1e-12)


def test_layers_that_are_cheap_to_lose_together_go() -> None:
    problem, oracle = _problem(4, 2000)

    def loss(candidate: Candidate) -> float:
        gone = [not any(candidate[2 * i : 2 * i + 2]) for i in range(4)]
        if gone == [False, True, True, False]:
            return 0.01 + sum(candidate[i] != problem.levels[i][-1] for i in (0, 1, 6, 7))
        return 1.0 + Additive.loss(oracle, candidate)

    oracle.loss = loss  # type: ignore[method-assign]
    assert search(problem, oracle)[2:6] == (0, 0, 0, 0)


def test_few_evaluations_thin_the_table_out() -> None:
    problem, oracle = _problem(3, 4)
    found = search(problem, oracle)
    table = [candidate for candidate, share in oracle.asked if share < 1]
    # half of the rest, in models on a part of the windows
    assert sum(share for _, share in oracle.asked) <= 4
    assert 6 <= len(table) < sum(len(own) - 1 for own in problem.levels)
    assert problem.price(found) <= problem.most
    # and says so
    said = check(problem)
    assert said is not None
    assert f"of up to {max(len(own) - 1 for own in problem.levels)} levels" in said
    assert check(_problem(3, 400)[0]) is None


def test_says_how_many_evaluations_it_takes() -> None:
    problem, oracle = _problem(8, 2)
    with pytest.raises(InputError, match="--search-evaluations 2: .* measures"):
        check(problem)
    with pytest.raises(InputError, match="give 8 or more"):
        search(problem, oracle)
    check(replace(problem, evaluations=8))
    with pytest.raises(InputError, match="--search-evaluations 7"):
        check(replace(problem, evaluations=7))


@pytest.mark.parametrize("stop", [0, 1, 20, 55])
def test_an_interrupted_search_asks_the_same_and_finds_the_same(stop: int) -> None:
    problem, whole = _problem(3, 60)
    expected = search(problem, whole)
    _, broken = _problem(3, 60)
    answer = broken.losses

    def losses(candidates: Sequence[Candidate], share: float = 1.0) -> list[float]:
        if len(broken.asked) >= stop:
            raise KeyboardInterrupt
        return answer(candidates, share)

    broken.losses = losses  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        search(problem, broken)
    assert broken.asked == whole.asked[: len(broken.asked)]
    _, again = _problem(3, 60)
    assert search(problem, again) == expected
    assert again.asked == whole.asked


def test_one_window_tells_nothing_apart() -> None:
    problem, oracle = _problem(2, 400)
    with pytest.raises(InputError, match="raise --search-samples"):
        search(replace(problem, windows=1), oracle)


def test_is_never_worse_than_uniform() -> None:
    problem, oracle = _problem(3, 60)
    found = search(problem, oracle)
    first, share = oracle.asked[0]
    assert share == 1.0
    assert oracle.loss(found) <= oracle.loss(first)


@pytest.mark.parametrize("evaluations", [1, 4, 64, 200])
def test_a_plan_counts_what_a_search_may_ask(evaluations: int) -> None:
    asked = sum(count * share for count, share in calls(evaluations, 64, 16))
    assert asked <= evaluations


def test_is_an_allocation() -> None:
    own = ALLOCATIONS["segments"]
    assert own.search is search
    assert not own.equal

"""Searches over whole models: against every candidate of small problems."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from liar_searches import SLACK, Losses, is_full, problem, within

from liar_ext import InputError
from liar_ext.allocation import ALLOCATIONS, Budget, evolution, level_swaps, rl_pruner
from liar_ext.allocation.search import Problem
from liar_ext.allocation.space import Space
from liar_ext.allocation.trials import Trials

# segments asks about single changes, most of which are beyond the budget: test_segments.py
SEARCHES = [n for n, allocation in ALLOCATIONS.items() if allocation.search and n != "segments"]
# with errors of levels: these start from their solution, too
SOLVED = [name for name in SEARCHES if ALLOCATIONS[name].survey == "levels"]
# any width can come of these with any number of draws
FREE = [name for name in SEARCHES if name != "spdy"]


def run(name, given, losses):
    return ALLOCATIONS[name].search(given, losses)


def test_these_are_the_searches():
    assert SEARCHES == ["spdy", "level-swaps", "evolution", "rl-pruner"]
    assert SEARCHES[:2] == SOLVED


@pytest.mark.parametrize("stairs", [False, True], ids=["linear", "stairs"])
@pytest.mark.parametrize("sites", [3, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FREE)
def test_no_candidate_is_better_than_the_one_that_is_found(name, seed, sites, stairs):
    """Losses have products of Sites, so that no Site can be judged alone."""
    given, losses = problem(seed, sites, stairs=stairs, sparsity=0.35, evaluations=300)
    found = run(name, given, losses)
    assert losses.of(found) == min(map(losses.of, within(given)))


@pytest.mark.parametrize("sites", [3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_sensitivities_lead_to_a_better_candidate_than_those_of_spdy(seed, sites):
    """Every full candidate that is the solution for one of many weights; not all of them are."""
    given, losses = problem(seed, sites, sparsity=0.45, evaluations=250)
    found = run("spdy", given, losses)
    candidates = within(given)
    alone = np.array([[losses.alone(s, k) for s, k in enumerate(c)] for c in candidates])
    weights = np.random.default_rng(seed).random((3000, sites))
    reached = {candidates[place] for place in (weights @ alone.T).argmin(1)}
    assert len(reached) > 3
    assert losses.of(found) <= min(map(losses.of, reached))


@pytest.mark.parametrize("evaluations", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SEARCHES)
def test_few_evaluations_are_never_worse_than_where_a_search_starts(name, seed, evaluations):
    given, losses = problem(seed, 6, 8, sparsity=0.4, evaluations=evaluations)
    space = Space(given)
    starts = [space.candidate(space.uniform())]
    if name in SOLVED and evaluations > 1:
        starts.append(space.candidate(space.solved(space.errors(), [1.0] * 6)))
    found = run(name, given, losses)
    assert losses.of(found) <= min(map(losses.of, starts))
    assert losses.spent <= evaluations * SLACK
    # what is returned was judged on all windows, and is the best of those
    whole = [candidate for candidate, share in losses.asked if share == 1]
    assert losses.of(found) == min(map(losses.of, whole))
    assert found in whole
    if evaluations == 1:
        assert losses.asked == [(starts[0], 1.0)]


@pytest.mark.parametrize("stairs", [False, True], ids=["linear", "stairs"])
@pytest.mark.parametrize("name", SEARCHES)
def test_every_question_is_full_within_the_budget_new_and_of_levels(name, stairs):
    given, losses = problem(5, 6, 8, stairs=stairs, sparsity=0.3, evaluations=60)
    run(name, given, losses)
    assert 40 < losses.spent <= 60
    assert len(losses.asked) == len(set(losses.asked))
    for candidate in {candidate for candidate, _ in losses.asked}:
        assert given.price(candidate) <= given.most * SLACK
        assert is_full(given, candidate)
        for kept, own in zip(candidate, given.levels, strict=True):
            assert kept in own


@pytest.mark.parametrize("name", SEARCHES)
def test_the_seed_decides(name):
    asked = []
    for seed in (0, 0, 1):
        given, losses = problem(4, 6, 8, evaluations=40)
        found = run(name, dataclasses.replace(given, seed=seed), losses)
        asked.append((found, losses.asked))
    assert asked[0] == asked[1]
    assert asked[0][1] != asked[2][1]


@pytest.mark.parametrize("stop", [0, 1, 2, 11, 37])
@pytest.mark.parametrize("name", SEARCHES)
def test_an_interrupted_search_asks_the_same_and_finds_the_same(name, stop):
    given, whole = problem(3, 6, 8, evaluations=40)
    expected = run(name, given, whole)
    broken = Losses(given, 3, most=stop)
    with pytest.raises(KeyboardInterrupt):
        run(name, given, broken)
    assert broken.asked == whole.asked[:stop]
    # answers from memory are the same numbers
    again = Losses(given, 3)
    assert run(name, given, again) == expected
    assert again.asked == whole.asked


@pytest.mark.parametrize("name", SEARCHES)
def test_one_site_keeps_its_highest_level_that_fits(name):
    given, losses = problem(0, 1, sparsity=0.5)
    assert run(name, given, losses) == (max(within(given))[0],)
    assert len(losses.asked) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FREE)
def test_two_levels_a_site_are_a_choice_of_sites(name, seed):
    given, losses = problem(seed, 6, 2, sparsity=0.25, evaluations=100)
    assert losses.of(run(name, given, losses)) == min(map(losses.of, within(given)))


@pytest.mark.parametrize("name", SEARCHES)
def test_the_lowest_levels_are_all_there_is_at_the_largest_sparsity(name):
    given, losses = problem(1, 4, sparsity=0.5)
    least = tuple(own[0] for own in given.levels)
    sparsity = 1 - given.price(least) / given.price([own[-1] for own in given.levels])
    given = dataclasses.replace(given, sparsity=sparsity)
    assert run(name, given, losses) == least
    with pytest.raises(InputError, match="lower --sparsity"):
        run(name, dataclasses.replace(given, sparsity=sparsity + 0.01), losses)


@pytest.mark.parametrize("name", SEARCHES)
def test_models_without_a_finite_loss_are_never_chosen(name):
    given, losses = problem(2, 4, sparsity=0.4, evaluations=60)
    space = Space(given)
    broken = space.candidate(space.uniform())
    finite = losses.of

    def of(candidate):
        return math.nan if candidate == broken else finite(candidate)

    losses.of = of
    found = run(name, given, losses)
    assert found != broken
    assert math.isfinite(losses.of(found))


def test_evaluations_count_by_their_share_and_end():
    given, losses = problem(0, 5, sparsity=0.4, evaluations=3)
    space = Space(given)
    trials = Trials(space, losses)
    full = [c for c in within(given) if is_full(given, c)][:40]
    positions = [tuple(own.index(k) for own, k in zip(given.levels, c, strict=True)) for c in full]
    assert trials.losses(positions[:4], 1 / 4) == trials.losses(positions[:4], 1 / 4)
    assert trials.left == 2
    found = trials.losses(positions[:5])
    assert found[:2] == list(map(losses.of, full[:2]))
    assert found[2:] == [math.inf] * 3
    assert (trials.left, losses.spent) == (0, 3)
    assert trials.losses(positions[5:6], 1 / 64) == [math.inf]
    assert trials.ranked() == sorted(positions[:2], key=lambda p: losses.of(space.candidate(p)))
    with pytest.raises(ValueError, match="evaluations: 0"):
        Trials(Space(dataclasses.replace(given, evaluations=0)), losses)


@pytest.mark.parametrize(
    ("windows", "first", "offspring"), [(None, 1 / 64, 128), (128, 1 / 64, 128), (16, 1 / 16, 32)]
)
def test_offspring_of_level_swaps_go_through_the_stages(windows, first, offspring):
    """16 survive the first stage, 4 the second. One window of 16 costs more than 1/64."""
    given, losses = problem(0, 12, 20, evaluations=2 + 8)
    run("level-swaps", dataclasses.replace(given, windows=windows), losses)
    counts = {share: sum(s == share for _, s in losses.asked) for share in (first, 1 / 8, 1.0)}
    assert counts == {first: offspring, 1 / 8: 16, 1.0: 2 + 4}
    assert sum(counts.values()) == len(losses.asked)
    for share, following in ((first, 1 / 8), (1 / 8, 1.0)):
        judged = [candidate for candidate, own in losses.asked if own == share]
        again = dict(zip(judged, Losses(given, 0).losses(judged, share), strict=True))
        best = sorted(judged, key=again.__getitem__)
        # uniform and the solution for even weights were asked before
        survivors = [candidate for candidate, own in losses.asked if own == following][
            2 if following == 1 else 0 :
        ]
        assert survivors == best[: len(survivors)]


@pytest.mark.parametrize("windows", [1, 2, 5, 8])
def test_a_share_is_rounded_up_to_whole_windows_and_paid_for_like_that(windows):
    given, losses = problem(0, 6, 8, sparsity=0.4, evaluations=30)
    run("level-swaps", dataclasses.replace(given, windows=windows), losses)
    assert 24 < losses.spent <= 30 * SLACK
    shares = {share * windows for _, share in losses.asked}
    assert all(share == pytest.approx(round(share)) for share in shares)
    assert len(losses.asked) == len(set(losses.asked))


def test_a_swap_raises_one_site_by_its_stride_and_lowers_others():
    levels = [tuple(range(1, 41))] * 3
    given = Problem([Budget("ffn", 40, 1)] * 3, 0.5, levels, 1, 0)
    space = Space(given)
    generator = np.random.default_rng(0)
    for stride, step in ((1 / 8, 5), (1 / 64, 1)):
        for _ in range(20):
            swapped = level_swaps._swapped(space, (19, 19, 19), stride, generator)
            assert sorted(swapped) == [19 - step, 19, 19 + step]


def test_mutants_of_evolution_keep_most_of_a_site_in_a_small_change():
    given = Problem([Budget("ffn", 100, 1)] * 4, 0.5, [tuple(range(1, 101))] * 4, 1, 0)
    space = Space(given)
    generator = np.random.default_rng(0)
    parent = space.uniform()
    assert evolution.mutated(space, parent, 0.0, 0.0, generator) == parent
    spread = [
        max(
            abs(after - before)
            for _ in range(50)
            for after, before in zip(
                evolution.mutated(space, parent, small, any_, generator), parent, strict=True
            )
        )
        for small, any_ in ((1.0, 0.0), (0.0, 1.0))
    ]
    # the way back to the budget moves a Site further at most as far as all went together
    assert 10 < spread[0] <= 4 * 20
    assert spread[1] > spread[0]


def test_no_entry_of_a_distribution_changes_by_more_than_the_clip():
    drawn = np.random.default_rng(1)
    now, towards = (rl_pruner.normalised(p / p.sum()) for p in drawn.random((2, 6)))
    moved = rl_pruner.updated(now, towards)
    assert moved.sum() == pytest.approx(1)
    # clipped ratios, all divided by one sum
    ratio = moved / now
    assert ratio.max() / ratio.min() <= 1.2 / 0.8 + 1e-12
    assert np.abs(moved - towards).sum() < np.abs(now - towards).sum()
    for _ in range(100):
        now = rl_pruner.updated(now, towards)
    assert now == pytest.approx(towards)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 9, 30, 64])
@pytest.mark.parametrize("windows", [5, 16])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_plan_knows_what_is_asked(name, windows, evaluations):
    """Calls of the oracle by their number of candidates, where new ones are always found."""
    given, losses = problem(0, 12, 20, evaluations=evaluations)
    asked = []
    answer = losses.losses

    def recorded(candidates, share=1.0):
        asked.append((len(candidates), share))
        return answer(candidates, share)

    losses.losses = recorded
    run(name, dataclasses.replace(given, windows=windows), losses)
    found = ALLOCATIONS[name].calls(evaluations, 12, windows)
    assert [share for _, share in found] == [share for _, share in asked]
    # a crossing may be one of the mutants, and of few Sites a swap may not be new
    few = 2 if name in ("evolution", "level-swaps") else 0
    assert all(abs(a - b) <= few for (a, _), (b, _) in zip(found, asked, strict=True))


def test_noise_is_clamped_before_an_action_is_normalised():
    """The sum is negative, and what noise made largest stays largest."""
    found = rl_pruner.normalised(np.array([-1.75, -0.25, 0.45, 0.35]))
    least = rl_pruner.LEAST / 4
    assert found == pytest.approx(np.array([least, least, 0.45, 0.35]) / (0.8 + 2 * least))


def test_noise_grows_with_known_models_up_to_a_bound():
    found = [rl_pruner.wider(repeated) for repeated in (0, 1, 10, 100, 10**6)]
    assert found == pytest.approx([1.0, 1.05, 1.05**10, 16.0, 16.0])


@pytest.mark.parametrize("seed", range(3))
def test_an_action_takes_its_share_of_the_price_from_every_site(seed):
    drawn = random.Random(seed)
    levels = [tuple(range(1, 1001))] * 4
    budgets = [Budget("ffn", 1000, cost) for cost in (3, 5, 7, 9)]
    given = Problem(budgets, 0.3, levels, 1, 0)
    action = rl_pruner.normalised(np.array([drawn.uniform(1, 2) / 6 for _ in budgets]))
    found = Space(given).candidate(rl_pruner.placed(Space(given), action))
    removed = np.array([b.price(1000) - b.price(k) for b, k in zip(budgets, found, strict=True)])
    # one unit of the dearest Site, spread over the rest
    assert removed / removed.sum() == pytest.approx(action, abs=2 * 9 / removed.sum())

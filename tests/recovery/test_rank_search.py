"""The search for ranks: budgets, what it asks for, and what an interrupted one goes on from."""

from __future__ import annotations

import math

import pytest

from liar_ext import InputError
from liar_ext.recovery.rank_search import (
    RankSearch,
    TrialJournal,
    fitted,
    grid,
    search,
    trials_in,
)

COSTS = (30, 30, 44, 30, 61, 30)
HOW = RankSearch(initial=6, rounds=6, proposals=24, steps=1)


def loss_of(ranks):
    """The fourth layer wants all that it can get, the others little."""
    return sum((rank - (12 if layer == 3 else 6)) ** 2 for layer, rank in enumerate(ranks)) / 10


def test_choices_spend_the_budget_and_none_is_asked_for_twice():
    asked = []

    def ask(number, ranks):
        assert number == len(asked)
        asked.append(ranks)
        return loss_of(ranks)

    tried = search(ask, COSTS, 8, HOW, 0)
    assert [ranks for ranks, _ in tried] == asked
    assert asked[0] == (8,) * 6
    assert len(set(asked)) == len(asked) == 12
    budget = 8 * sum(COSTS)
    steps = [b - a for a, b in zip(grid(8)[:-1], grid(8)[1:], strict=True)]
    for ranks in asked:
        spent = sum(r * c for r, c in zip(ranks, COSTS, strict=True))
        assert set(ranks) <= set(grid(8))
        assert spent <= budget
        # nothing that costs least would fit any more, unless all have the most
        raised = [c for r, c in zip(ranks, COSTS, strict=True) if r < 12]
        assert not raised or spent + min(raised) * min(steps) > budget


def test_it_finds_better_ones_than_chance():
    """Against as many choices at random, over several seeds."""

    def best(how):
        found = [search(lambda _, r: loss_of(r), COSTS, 8, how, seed) for seed in range(8)]
        return sum(min(loss for _, loss in tried) for tried in found) / 8

    guided = best(RankSearch(initial=6, rounds=12, proposals=24, steps=1))
    chance = best(RankSearch(initial=18, rounds=0, proposals=2, steps=1))
    assert guided < 0.8 * chance


def test_the_performance_model_learns_its_data_and_is_the_same_each_time():
    choices = [ranks for ranks, _ in search(lambda _, r: loss_of(r), COSTS, 8, HOW, 1)]
    losses = [loss_of(ranks) for ranks in choices]
    found = fitted(choices, losses, grid(8), 0)(choices)
    assert fitted(choices, losses, grid(8), 0)(choices).equal(found)
    order = sorted(range(len(choices)), key=losses.__getitem__)
    assert found.argsort()[0] == order[0]
    assert found.argsort()[-1] == order[-1]
    # what did not train is as bad as the worst, no more and no NaN
    broken = fitted(choices, [math.inf, *losses[1:]], grid(8), 0)(choices)
    assert bool(broken.isfinite().all())


def test_an_interrupted_search_asks_for_what_is_missing_alone(tmp_path):
    path, identity = tmp_path / "kept" / "trials.jsonl", {"seed": 0}
    whole = search(lambda _, ranks: loss_of(ranks), COSTS, 8, HOW, 0)
    asked = []

    def ask(journal, limit):
        def of(number, ranks):
            known = journal.get(ranks)
            if known is not None:
                return known
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(ranks)
            journal.add(ranks, loss_of(ranks))
            return loss_of(ranks)

        return of

    for limit in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            search(ask(TrialJournal(path, identity), limit), COSTS, 8, HOW, 0)
        assert trials_in(path) == limit
        # cut off in the middle of a line
        with open(path, "ab") as file:
            file.write(b'{"ranks": [1, 2')
    assert search(ask(TrialJournal(path, identity), 99), COSTS, 8, HOW, 0) == whole
    assert asked == [ranks for ranks, _ in whole]


def test_a_journal_of_something_else_or_damaged(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = TrialJournal(path, {"recovery": {"rank": 8}})
    journal.add((1, 2), math.inf)
    assert TrialJournal(path, {"recovery": {"rank": 8}}).get((1, 2)) == math.inf
    with pytest.raises(InputError, match="--resume: recovery.rank is 4, and 8 in"):
        TrialJournal(path, {"recovery": {"rank": 4}})
    path.write_bytes(path.read_bytes() + b"[]\n")
    with pytest.raises(InputError, match="trials.jsonl: cannot be read .* --overwrite"):
        TrialJournal(path, {"recovery": {"rank": 8}})


def test_few_layers_end_early():
    """Two choices fit one layer's budget at most: all are tried, and then it is over."""
    tried = search(lambda _, ranks: float(ranks[0]), (5,), 8, HOW, 0)
    assert [ranks for ranks, _ in tried] == [(8,)]


@pytest.mark.parametrize(("field", "value"), [("initial", 1), ("rounds", -1), ("steps", 0)])
def test_settings_that_mean_nothing(field, value):
    with pytest.raises(InputError, match=f"--trial-{field} {value}: must be at least"):
        RankSearch(**{field: value})

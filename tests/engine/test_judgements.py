"""A criterion is asked once for the same evidence, and never for another's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from liar_families import FAMILIES

from liar_ext import Recipe, ops
from liar_ext.criteria import CRITERIA, Evidence
from liar_ext.engine.judgements import Judgements
from liar_ext.models import adapter_for


@pytest.fixture
def site():
    model = FAMILIES["llama-mha"].build()
    return adapter_for(model.config).sites_of(model, 0, ("ffn",))[0]


def _evidence(site, seed: int, keep: int | None = 20, **rest) -> Evidence:
    rows = torch.randn(200, site.columns, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(7)
    return Evidence(site, ops.gram(rows), generator, keep=keep, **rest)


class Counting:
    """A registry's criterion that counts how often it is asked."""

    def __init__(self, name: str, choices: bool = True) -> None:
        self.calls = 0
        from dataclasses import replace

        plain = CRITERIA[name]

        def score(evidence):
            self.calls += 1
            return plain.score(evidence)

        self.criterion = Judgements().of(replace(plain, score=score), choices=choices)


@pytest.mark.parametrize("name", ["wanda", "random"])
def test_a_judgement_is_repeated_to_the_bit_with_the_generator_as_it_left_it(site, name):
    counting = Counting(name)
    first, second, plain = (_evidence(site, 1) for _ in range(3))
    expected = CRITERIA[name].select(plain)
    assert torch.equal(counting.criterion.select(first), expected)
    asked = counting.calls
    assert torch.equal(counting.criterion.select(second), expected)
    assert counting.calls == asked
    assert torch.equal(second.generator.get_state(), plain.generator.get_state())


def test_other_evidence_is_judged_anew(site):
    counting = Counting("wanda")
    counting.criterion.select(_evidence(site, 1))
    for other in (
        _evidence(site, 2),
        _evidence(site, 1, keep=21),
        _evidence(site, 1, ridge=1e-3),
        _evidence(site, 1, center=True),
    ):
        asked = counting.calls
        counting.criterion.select(other)
        assert counting.calls > asked
    drawn = _evidence(site, 1)
    drawn.generator.manual_seed(8)
    asked = counting.calls
    counting.criterion.select(drawn)
    assert counting.calls > asked


def test_on_the_pruned_path_only_scores_for_an_allocation_are_kept(site):
    counting = Counting("wanda", choices=False)
    for keep, calls in ((20, 2), (None, 1)):
        counting.calls = 0
        for _ in range(2):
            evidence = _evidence(site, 1, keep=keep)
            judge = counting.criterion.score if keep is None else counting.criterion.select
            judge(evidence)
        assert counting.calls == calls


def test_what_a_criterion_notes_is_noted_again(site):
    judgements = Judgements()
    swap = judgements.of(CRITERIA["obs-swap"], choices=True)
    first, second = _evidence(site, 1, ridge=1e-3), _evidence(site, 1, ridge=1e-3)
    second.notes.append("before")
    kept = swap.select(first)
    assert torch.equal(swap.select(second), kept)
    assert second.notes == ["before", *first.notes]


def test_levels_are_those_of_all_that_they_depend_on():
    known = Judgements()
    base = Recipe(sparsity=0.3, allocation="spdy")
    first = known.levels(base, 0)
    for same in (
        {"sparsity": 0.5},
        {"allocation": "evolution"},
        {"search_samples": 3, "search_evaluations": 7},
        {"budget": "flops"},
    ):
        assert known.levels(replace(base, **same), 0) is first, same
    for other in (
        {"criterion": "obs"},
        {"reconstruct": "none"},
        {"ridge": 0.5},
        {"target": ("heads",)},
        {"round_to": 8},
        {"seed": 1},
        {"bias": "always"},
    ):
        assert known.levels(replace(base, **other), 0) is not first, other
    # its probabilities are learnt for a budget
    policy = replace(base, criterion="policy")
    assert known.levels(policy, 0) is not known.levels(replace(policy, sparsity=0.5), 0)
    assert known.levels(policy, 0) is known.levels(replace(policy, allocation="evolution"), 0)


def test_levels_that_were_not_asked_for_longest_make_room(monkeypatch):
    known = Judgements()
    recipes = [Recipe(allocation="spdy", seed=seed) for seed in range(3)]
    first, second, _ = (known.levels(recipe, 0) for recipe in recipes)
    assert known.levels(recipes[0], 0) is first
    left = iter([10, 1000])
    monkeypatch.setattr("liar_ext.engine.judgements.free_bytes", lambda device: next(left))
    known.levels(Recipe(allocation="spdy", seed=9), 500)
    monkeypatch.undo()
    assert known.levels(recipes[0], 0) is first
    assert known.levels(recipes[1], 0) is not second

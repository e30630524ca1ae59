"""A selection whose pivots fail goes on with more ridge, says so, and names its Site if none is
enough."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from liar_families import FAMILIES, batches_of, write_tokens

import liar_ext
from liar_ext import Recipe
from liar_ext.criteria import CRITERIA, Evidence
from liar_ext.errors import NumericalError
from liar_ext.models import adapter_for
from liar_ext.ops import gram_reference
from liar_ext.ops.removal import Tableau

GREEDY = [name for name, criterion in CRITERIA.items() if criterion.greedy]


def evidence_of(kind: str, **changes) -> Evidence:
    model = FAMILIES["llama-mha"].build()
    site = adapter_for(model.config).sites_of(model, 0, (kind,))[0]
    x = torch.randn(400, site.columns, generator=torch.Generator().manual_seed(2))
    given = {"ridge": 1e-4, "center": True, "keep": site.units // 2, **changes}
    return Evidence(site, gram_reference(x), **given)


@pytest.fixture
def failing(monkeypatch):
    """Makes so many tableaus lose their definiteness at their second move."""

    def start(times: int) -> list[Tableau]:
        seen: list[Tableau] = []
        real = Tableau.move

        def move(self, units):
            if not any(self is other for other in seen):
                seen.append(self)
            elif len(seen) <= times:
                raise NumericalError("a block of 1 columns is not positive definite (pivot 1)")
            real(self, units)

        monkeypatch.setattr(Tableau, "move", move)
        return seen

    return start


@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", GREEDY)
def test_it_is_the_selection_of_the_ridge_that_was_enough(name, kind, failing):
    expected = CRITERIA[name].select(evidence_of(kind, ridge=1e-2))
    scores = CRITERIA[name].score(evidence_of(kind, ridge=1e-2))
    failing(2)
    evidence = evidence_of(kind)
    assert torch.equal(CRITERIA[name].select(evidence), expected)
    assert [note.rpartition(": ")[2] for note in evidence.notes] == [
        "ridge 1.0e-03",
        "ridge 1.0e-02",
    ]
    assert all("selection: a block of 1 columns" in note for note in evidence.notes)
    failing(2)
    again = evidence_of(kind)
    assert torch.equal(CRITERIA[name].score(again), scores)
    assert len(again.notes) == 2


@pytest.mark.parametrize("name", GREEDY)
def test_a_selection_that_no_ridge_helps_names_its_site(name, failing):
    failing(100)
    with pytest.raises(
        NumericalError, match=r"layers\.0\.mlp\.down_proj: no ridge is enough .*a bl"
    ):
        CRITERIA[name].select(evidence_of("ffn"))


def test_blocks_of_units_that_lost_their_definiteness_are_a_numerical_error():
    """Not one of the library's own, which no ladder catches."""
    found = Tableau(-torch.eye(6, dtype=torch.float64), torch.ones(2, 6), 3)
    with pytest.raises(NumericalError, match="blocks of 2 units are not positive definite"):
        found.costs()


@pytest.mark.parametrize("allocation", ["uniform", "levels", "global"])
def test_the_report_says_which_ridge_a_selection_took(allocation, failing, tmp_path):
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "t.npy")),
        samples=24,
        seq_len=24,
        criterion="obs",
        allocation=allocation,
        sparsity=0.4,
    )
    batches = batches_of(recipe, decoder=True)
    failing(1)
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    first = report.sites[0]
    steps = [step for step in first.steps if "selection: a block of" in step]
    assert len(steps) == 1 and steps[0].endswith("ridge 1.0e-03")
    assert steps[0].startswith("survey: ") == (allocation != "uniform")
    assert any(first.name in line and "selection" in line for line in report.warnings)
    # the repair has the ridge that was asked for
    assert first.ridge == first.ridge_used == recipe.ridge
    failing(100)
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj: no ridge is enough"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, dataclasses.replace(recipe, seed=1))

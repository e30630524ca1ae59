"""Criteria that judge by gradients, against their formulas."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES

from liar_ext.criteria import CRITERIA, Evidence
from liar_ext.criteria.fisher import rearrange
from liar_ext.models import adapter_for
from liar_ext.ops import ColumnMoments
from liar_ext.ops.saliency import TAYLOR_FORMS, UnitGradients

GATED = ("snip", "michel", "fisher", "fisher-rearranged")


def evidence(kind: str = "ffn", examples: int = 5, keep: int | None = None) -> Evidence:
    model = FAMILIES["qwen3"].build()
    site = adapter_for(model.config).sites_of(model, 1, (kind,))[0]
    generator = torch.Generator().manual_seed(2)
    gates = torch.randn(examples, site.units, generator=generator, dtype=torch.float64)
    taylor = {form: torch.rand(site.units, generator=generator).double() for form in TAYLOR_FORMS}
    statistics = ColumnMoments.zeros(site.columns)
    return Evidence(site, statistics, prior=UnitGradients(gates, taylor), keep=keep)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", GATED)
def test_scores_are_the_formula_for_each_unit(name, kind):
    found = CRITERIA[name].score(evidence(kind))
    assert CRITERIA[name].needs == "gradients"
    assert evidence(kind).prior is not None
    gates = evidence(kind).gates.tolist()
    for unit in range(len(gates[0])):
        column = [row[unit] for row in gates]
        expected = {
            "snip": abs(sum(column)),
            "michel": sum(abs(value) for value in column),
        }.get(name, sum(value**2 for value in column))
        assert float(found[unit]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", TAYLOR_FORMS)
def test_taylor_criteria_hand_on_their_form(form):
    criterion, given = CRITERIA[f"taylor-{form}"], evidence("heads")
    assert criterion.needs == "weight_gradients"
    assert torch.equal(criterion.score(given), given.taylor(form))


def naive_rearrange(gates, dropped):
    """The published exchange with its list, written out."""
    order = sorted(range(gates.shape[1]), key=lambda u: float((gates[:, u] ** 2).sum()))
    going = order[:dropped]
    for joins in order[dropped:]:
        going.append(joins)
        total = gates[:, going].sum(1)
        without = [float(((total - gates[:, u]) ** 2).sum()) for u in going]
        del going[without.index(min(without))]
    return going


@pytest.mark.parametrize(("units", "examples", "dropped"), [(17, 3, 5), (9, 8, 8), (33, 1, 20)])
def test_the_exchange_is_the_published_one(units, examples, dropped):
    gates = torch.randn(
        examples, units, generator=torch.Generator().manual_seed(units), dtype=torch.float64
    )
    found = rearrange(gates, dropped)
    assert sorted(found.tolist()) == sorted(naive_rearrange(gates, dropped))


@pytest.mark.parametrize("keep", [1, 20, 47, 48])
def test_rearranged_keeps_as_many_and_loses_less(keep):
    given = evidence(keep=keep)
    plain = CRITERIA["fisher"].select(given)
    found = CRITERIA["fisher-rearranged"].select(given)
    assert len(found) == len(found.unique()) == keep

    def loss(kept):
        gone = torch.ones(48, dtype=torch.bool)
        gone[kept] = False
        return float(given.gates[:, gone].sum(1).square().sum())

    assert loss(found) <= loss(plain)
    said = [note for note in given.remarks if "exchanges lowered the Fisher loss" in note]
    assert bool(said) == (not torch.equal(found, plain))

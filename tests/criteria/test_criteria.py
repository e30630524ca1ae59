"""Criteria against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES

from liar_ext.criteria import CRITERIA, Evidence, unit_scores
from liar_ext.models import adapter_for
from liar_ext.ops import ColumnMoments, gram


def site_and_data(kind: str):
    model = FAMILIES["qwen3"].build()
    site = adapter_for(model.config).sites_of(model, 1, (kind,))[0]
    # deviations as large as the means: a variance from float32 sums is as exact as the sums then
    x = torch.randn(400, site.columns) * (0.5 + torch.rand(site.columns)) + torch.randn(
        site.columns
    )
    return site, x


def written_out(name: str, weight, x, kind: str):
    weight, x = weight.double(), x.double()
    scores = []
    for j in range(x.shape[1]):
        column, inputs = weight[:, j], x[:, j]
        if name == "magnitude":
            scores.append((column**2).sum() ** 0.5)
        elif name == "wanda":
            scores.append(column.abs().mean() * (inputs**2).mean() ** 0.5)
        elif name == "flap":
            metric = ((inputs - inputs.mean()) ** 2).mean() * (column**2).sum()
            scores.append(metric**2 if kind == "heads" else metric)
    return torch.stack(scores)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap"])
def test_scores_are_the_formula_from_either_kind_of_statistics(name, kind):
    site, x = site_and_data(kind)
    expected = written_out(name, site.weight(), x, kind)
    light = ColumnMoments.zeros(site.columns)
    light.add(x[:150])
    light.add(x[150:])
    for statistics in (gram(x), light):
        found = CRITERIA[name].score(Evidence(site, statistics))
        assert torch.allclose(found, expected, rtol=1e-4)


def test_a_unit_is_the_sum_of_its_columns():
    site, x = site_and_data("heads")
    columns = CRITERIA["wanda"].score(Evidence(site, gram(x)))
    width = site.columns_per_unit
    expected = torch.stack([columns[u * width : (u + 1) * width].sum() for u in range(site.units)])
    assert torch.allclose(unit_scores(site, columns), expected)
    # two query heads of 12 share one KV head
    assert (site.units, width) == (4, 24)


def test_random_depends_on_the_seed_alone():
    site, x = site_and_data("ffn")
    draws = [
        CRITERIA["random"].score(Evidence(site, gram(x), torch.Generator().manual_seed(s)))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (site.units,)


def test_masked_tokens_enter_no_score():
    site, x = site_and_data("ffn")
    mask = torch.arange(400) < 300
    masked, plain = ColumnMoments.zeros(site.columns), ColumnMoments.zeros(site.columns)
    masked.add(x, mask)
    plain.add(x[:300])
    for name in ("wanda", "flap"):
        first = CRITERIA[name].score(Evidence(site, masked))
        assert torch.equal(first, CRITERIA[name].score(Evidence(site, plain)))

"""Inputs that break formulas: criteria and repairs make of them what can be made, or say so."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES

from liar_ext.allocation import Budget
from liar_ext.allocation.global_ranking import standardised
from liar_ext.criteria import CRITERIA, Evidence, unit_scores
from liar_ext.models import adapter_for
from liar_ext.ops import ColumnMoments, Moments, gram
from liar_ext.ops.residual import relative_residual
from liar_ext.reconstruction import RECONSTRUCTIONS, Task
from liar_ext.survey.spectra import hill

# those that are told by a pass of their own judge no statistics
TOLD = ("gradients", "weight_gradients", "policy")
JUDGES = [name for name, criterion in CRITERIA.items() if criterion.needs not in TOLD]
# what goes by inputs; in the others a column's own weights speak for it
INFORMED = ["flap", "flap-ifv", "rcpu", "leverage", "obs", "obs-swap"]


def normal(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))


def inputs(name: str, columns: int) -> torch.Tensor:
    x = normal(1 if name == "one token" else 2 if name == "two tokens" else 400, columns)
    if name == "zeros":
        x.zero_()
    elif name == "constants":
        x[:] = torch.linspace(-30, 30, columns)
    elif name == "zero columns":
        x[:, ::3] = 0.0
    elif name == "constant columns":
        x[:, ::3] = 30.0
    elif name == "twins":
        x[:, 1::2] = x[:, ::2]
    elif name == "all the same":
        x[:] = x[:, :1]
    elif name == "few tokens":
        x = x[: columns // 4]
    elif name == "huge means":
        x += 3e4
    elif name == "tiny":
        x *= 1e-18
    elif name == "large":
        x *= 1e15
    elif name == "outlier":
        x[7, 5] = 1e6
    return x


NAMES = (
    *("zeros", "constants", "zero columns", "constant columns", "twins", "all the same"),
    *("few tokens", "one token", "two tokens", "huge means", "tiny", "large", "outlier"),
)


def site_of(kind: str, dtype: torch.dtype = torch.float32):
    model = FAMILIES["llama-mha"].build().to(dtype)
    return adapter_for(model.config).sites_of(model, 0, (kind,))[0]


@pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kind", ["ffn", "heads"])
@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_chooses_and_every_repair_is_finite(name, kind, center):
    site = site_of(kind)
    moments = gram(inputs(name, site.columns))
    weight, width = site.weight().detach(), site.columns_per_unit
    for judge in JUDGES:
        evidence = Evidence(site, moments, ridge=1e-4, center=center, keep=site.units // 2)
        scores = CRITERIA[judge].score(evidence)
        assert bool(scores.isfinite().all()), judge
        assert float(scores.min()) >= 0, judge
        keep = CRITERIA[judge].select(evidence)
        assert keep.tolist() == sorted(set(keep.tolist())), judge
        assert len(keep) == site.units // 2, judge
    columns = site.unit_columns(keep)
    dropped = torch.ones(site.columns, dtype=torch.bool)
    dropped[columns] = False
    drop = dropped.nonzero().flatten()
    task = Task(moments, weight, columns, drop, 1e-4, center, unit=width)
    for repair, reconstruction in RECONSTRUCTIONS.items():
        if reconstruction.needs_bias and not center:
            continue
        found = reconstruction.repair(task)
        assert bool(found.weight.isfinite().all()), repair
        assert found.shift is None or bool(found.shift.isfinite().all()), repair
        residual = relative_residual(moments, weight, columns, found.weight, found.shift)
        assert 0 <= residual < float("inf"), repair


@pytest.mark.parametrize("name", INFORMED)
@pytest.mark.parametrize("value", [0.0, 30.0])
def test_what_never_changes_goes_first(name, value):
    """Whatever its weights; of float32 sums a constant has a variance of their rounding."""
    site = site_of("ffn")
    x = normal(4000, site.columns)
    constant = torch.arange(0, site.columns, 4)
    x[:, constant] = value
    with torch.no_grad():
        site.weight()[:, constant] *= 100
    evidence = Evidence(site, gram(x), ridge=1e-4, center=True, keep=site.columns - len(constant))
    keep = CRITERIA[name].select(evidence)
    assert not set(keep.tolist()) & set(constant.tolist())
    scores = unit_scores(site, CRITERIA[name].score(evidence))
    others = torch.ones(site.columns, dtype=torch.bool)
    others[constant] = False
    assert float(scores[constant].max()) < float(scores[others].min())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_weights_of_16_bits_are_judged_as_the_numbers_they_are(kind, dtype):
    half = site_of(kind, dtype)
    whole = site_of(kind, dtype)
    whole.module.float()
    x = inputs("twins", half.columns)
    for judge in JUDGES:
        scores = [
            CRITERIA[judge].score(
                Evidence(site, gram(x), torch.Generator().manual_seed(3), ridge=1e-4)
            )
            for site in (half, whole)
        ]
        assert scores[0].dtype == torch.float64
        assert torch.equal(*scores), judge


def test_a_selection_without_loss_exchanges_nothing():
    site = site_of("ffn")
    with torch.no_grad():
        site.weight().zero_()
    evidence = Evidence(site, gram(normal(400, site.columns)), ridge=1e-4, keep=20)
    assert len(CRITERIA["obs-swap"].select(evidence)) == 20
    assert evidence.remarks == []


def test_scores_that_are_equal_up_to_rounding_stand_no_higher_than_each_other():
    """Standardised, their rounding would rank them among all other Sites' units."""
    third = torch.full((12,), 1 / 3, dtype=torch.float64)
    third[::2] += 2**-54
    assert float(third.std()) > 0
    found = standardised(Budget("ffn", 12, 1, third))
    assert torch.equal(found, torch.zeros(12, dtype=torch.float64))


def test_eigenvalues_that_are_equal_up_to_rounding_have_no_exponent():
    """An orthogonal matrix with a few directions of its own."""
    noise = 1 + 1e-13 * torch.arange(60, dtype=torch.float64)
    values = torch.cat([torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64), noise])
    found = hill(values)
    assert found != found or found < 100


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_a_variance_beside_a_huge_mean_is_that_of_the_values(mean):
    x = (normal(3000, 5) + mean).float()
    found = ColumnMoments.zeros(5)
    found.add(x[:1000])
    found.add(x[1000:])
    assert torch.allclose(found.variance(), x.double().var(0, correction=0), rtol=1e-3)


def test_moments_in_float64_know_a_variance_beside_a_huge_mean():
    x = (normal(3000, 5) + 1e5).double()
    found = gram(x, out=Moments.zeros(5, dtype=torch.float64))
    assert torch.allclose(found.variance(), x.var(0, correction=0), rtol=1e-3)

"""Hill exponents: of spectra that are power laws, and against the estimator written out."""

from __future__ import annotations

import math

import pytest
import torch
from liar_families import FAMILIES

from liar_ext.criteria import CRITERIA, Evidence
from liar_ext.models import adapter_for
from liar_ext.survey import SURVEYS, View
from liar_ext.survey.spectra import hill, spectrum


def power_law(alpha: float, count: int) -> torch.Tensor:
    """Quantiles of `p(λ) ∝ λ^−α` above 1, ascending."""
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - place) ** (-1 / (alpha - 1))


def matrix_with(values: torch.Tensor, columns: int, seed: int = 0) -> torch.Tensor:
    """(N, columns) whose squared singular values are the given ones."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q
        for size in (n, columns)
    )
    return left @ torch.diag(values.sqrt()) @ right.T


def written_out(values: list[float]) -> float:
    """AlphaPruning's estimator as its published code has it, with the paper's lower bound."""
    values = sorted(values)
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for log in logs:
        counts[min(int((log - logs[0]) / width), 99)] += 1
    edge = 10 ** (logs[0] + width * counts.index(max(counts)))
    best = (math.inf, math.nan)
    for start, least in enumerate(values[:-1]):
        if not 0.95 * edge <= least <= 1.5 * edge:
            continue
        tail = values[start:]
        n = len(tail)
        alpha = 1 + n / (sum(map(math.log, tail)) - n * math.log(least))
        distance = max(
            abs(1 - (value / least) ** (1 - alpha) - place / n) for place, value in enumerate(tail)
        )
        best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("alpha", [1.7, 2.5, 4.0, 7.0])
def test_a_power_law_has_its_exponent(alpha, shape):
    weight = matrix_with(power_law(alpha, 301), 337)
    found = spectrum(weight if shape == "wide" else weight.T)
    assert len(found) == 301
    # of 301 quantiles the sum of logarithms misses the largest values' share, about log(301)/301
    assert hill(found) == pytest.approx(alpha, rel=0.03)


@pytest.mark.parametrize("shape", [(24, 24), (37, 113), (200, 61)])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_published_estimator(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = weight * torch.rand(shape[1], generator=generator, dtype=torch.float64) ** 2
    values = torch.linalg.svdvals(weight).square()
    assert hill(spectrum(weight)) == pytest.approx(written_out(values.tolist()), rel=1e-6)


def test_scale_and_zeros_do_not_matter():
    weight = matrix_with(power_law(3.0, 60), 80)
    padded = torch.cat([1e-3 * weight, torch.zeros(40, 80, dtype=torch.float64)])
    assert hill(spectrum(padded)) == pytest.approx(hill(spectrum(weight)), rel=1e-6)


@pytest.mark.parametrize(
    "weight", [torch.zeros(5, 7), torch.ones(5, 7), torch.eye(6)], ids=["zeros", "rank 1", "equal"]
)
def test_what_has_no_tail_has_no_exponent(weight):
    assert math.isnan(hill(spectrum(weight)))


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "bert"])
def test_every_linear_of_the_layer_counts(name):
    model = FAMILIES[name].build()
    site = adapter_for(model.config).sites_of(model, 1, ("ffn",))[0]
    found = SURVEYS["spectra"].measure(View(site, CRITERIA["wanda"], Evidence(site, None)))
    weights = [p for p in site.module.parameters() if p.ndim == 2]
    expected = [written_out((torch.linalg.svdvals(w.double()) ** 2).tolist()) for w in weights]
    assert len(found) == {"llama-mha": 7, "gpt2": 4, "bert": 6}[name]
    assert sorted(found.tolist()) == pytest.approx(sorted(expected), rel=1e-5)

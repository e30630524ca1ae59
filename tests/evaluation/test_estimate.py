"""Estimates against scipy, closed forms, and how often intervals hold what they say."""

import numpy as np
import pytest
from scipy import stats

from liar_ext.errors import InputError
from liar_ext.evaluation import estimate
from liar_ext.evaluation.estimate import difference, jackknife, mean, perplexity, share


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 100, 10_000])
@pytest.mark.parametrize("probability", [0.025, 0.3, 0.5, 0.9, 0.975])
def test_quantiles_are_those_of_scipy(freedom, probability):
    want = stats.t.ppf(probability, freedom)
    assert estimate.student_quantile(probability, freedom) == pytest.approx(
        want, rel=2e-3, abs=1e-12
    )


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(0).normal(3, 2, 12)
    found = mean(values, "windows")
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(stats.sem(values))
    want = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert found.interval == pytest.approx(want, rel=1e-3)


def test_a_perplexity_has_the_errors_of_its_loss():
    losses = np.random.default_rng(0).normal(3, 0.2, 12)
    found, of_loss = perplexity(losses), mean(losses, "windows")
    assert found.value == pytest.approx(np.exp(losses.mean()))
    assert found.interval == pytest.approx(np.exp(of_loss.interval))
    assert found.standard_error == pytest.approx(found.value * of_loss.standard_error)
    assert np.isfinite(perplexity([900.0, 900.0]).value)


@pytest.mark.parametrize(("right", "of"), [(0, 7), (7, 7), (3, 7), (40, 90)])
def test_the_interval_of_a_share_is_wilsons(right, of):
    found = share([True] * right + [False] * (of - right))
    want = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert found.interval == pytest.approx((100 * want.low, 100 * want.high), abs=1e-9)
    assert found.value == pytest.approx(100 * right / of)


def test_a_jackknifed_mean_is_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 9)
    without = [np.delete(values, i).mean() for i in range(9)]
    found, want = jackknife(values.mean(), without, "pairs"), mean(values, "pairs")
    np.testing.assert_allclose(found.units, want.units)
    assert found.interval == pytest.approx(want.interval)


def test_a_single_unit_has_no_error():
    assert mean([2.0], "windows").interval is None
    assert perplexity([2.0]).standard_error is None
    assert difference(mean([2.0], "w"), mean([3.0], "w"), "w").standard_error is None


def test_pairs_are_more_certain_than_two_samples():
    generator = np.random.default_rng(0)
    text = generator.normal(3, 1, 50)
    dense = mean(text, "windows")
    pruned = mean(text + generator.normal(0.1, 0.01, 50), "windows")
    paired = difference(dense, pruned, "windows")
    want = stats.ttest_rel(pruned.units, dense.units).confidence_interval(0.95)
    assert paired.value == pytest.approx(pruned.value - dense.value)
    assert paired.interval == pytest.approx((want.low, want.high), rel=1e-4)
    unpaired = difference(dense, pruned, "windows", paired=False)
    assert unpaired.standard_error > 50 * paired.standard_error
    assert unpaired.standard_error == pytest.approx(
        np.hypot(dense.standard_error, pruned.standard_error)
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    """2000 samples: 95 % with a standard error of 0.5 points."""
    generator = np.random.default_rng(0)
    samples = generator.normal(1.0, 1.0, (2000, 6))
    inside = [low <= 1 <= high for low, high in (mean(row, "w").interval for row in samples)]
    assert abs(100 * np.mean(inside) - 95) < 2


def test_a_mean_is_not_beyond_what_it_can_be():
    found = mean([0.01, 0.2, 0.02], "windows", low=0.0)
    assert found.interval[0] == 0.0 < found.interval[1]
    assert "cut to 0" in found.method
    found = mean([99.9, 100, 100, 99.2], "windows", low=0, high=100)
    assert found.interval[1] == 100


def test_shares_without_a_pair_that_differs_are_not_certain():
    answers = np.ones(20, dtype=bool)
    found = difference(share(answers), share(answers), "questions")
    assert found.value == 0
    low, high = found.interval
    assert low < 0 < high == pytest.approx(-low)
    assert "Agresti-Min" in found.method
    # 25 of 100 lost, none won: 95 % of (0.5 - 25.5) / 102 ± z sqrt((26/102 - (25/102)²) / 102)
    right = np.ones(100, dtype=bool)
    left = np.arange(100) >= 25
    found = difference(share(right), share(left), "questions")
    half = 1.959964 * np.sqrt((26 / 102 - (25 / 102) ** 2) / 102)
    assert found.interval == pytest.approx((100 * (-25 / 102 - half), 100 * (-25 / 102 + half)))


def test_errors_of_a_broken_model_are_not_known_and_still_are_json():
    found = difference(perplexity([5, 5.1]), perplexity([400, 410]), "windows").to_json()
    assert found["standard_error"] is None
    assert found["confidence_interval"] is None


def test_different_numbers_of_units_are_no_pairs():
    with pytest.raises(InputError, match="2 and 3 windows are no pairs"):
        difference(mean([1, 2], "w"), mean([1, 2, 3], "w"), "windows")

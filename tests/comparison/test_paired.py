"""Differences between models whose figures come from a ledger are those of the models in memory."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from liar_ext.comparison.paired import best, from_base, kept
from liar_ext.evaluation import estimate
from liar_ext.evaluation.measured import Measured
from liar_ext.report.text import signed

COUNT = 40
HARD = np.random.default_rng(0).normal(3.0, 1.0, COUNT)
FIGURES = {
    "mean": lambda values: estimate.mean(values, "windows"),
    "perplexity": estimate.perplexity,
    "share": lambda values: estimate.share(values > 3.0, "windows"),
    "jackknife": lambda values: estimate.jackknife(
        float(values.mean()), (values.sum() - values) / (COUNT - 1), "windows"
    ),
}


def _measured(figure: str, values: np.ndarray) -> Measured:
    return Measured({"figure": FIGURES[figure](values)}, "windows", {})


def _entry(measured: Measured) -> dict:
    """As it is read back from the ledger's file."""
    return json.loads(json.dumps(kept({"text=a": measured}), allow_nan=False))


@pytest.mark.parametrize("figure", FIGURES)
def test_a_pair_from_the_ledger_is_the_pair_in_memory(figure):
    noise = np.random.default_rng(1).normal(0.05, 0.1, COUNT)
    dense, pruned = _measured(figure, HARD), _measured(figure, HARD + noise)
    found = from_base(_entry(pruned), _entry(dense), "text=a")["figure"].to_json()
    assert found == pruned.minus(dense.estimates)["figure"].to_json()
    assert found["paired"]
    alone = pruned.estimates["figure"].standard_error
    assert found["standard_error"] < alone / 2, "what both find hard drops out"


def test_without_units_errors_are_independent():
    """A set whose error the harness states; entries of a ledger that kept none."""
    one, other = (Measured({"m": estimate.stated(v, 0.3, "it")}, "", {}) for v in (1.0, 2.0))
    found = from_base(_entry(other), _entry(one), "text=a")["m"]
    assert (found.value, found.paired) == (1.0, False)
    assert found.standard_error == pytest.approx(math.hypot(0.3, 0.3))
    dense, pruned = (_entry(_measured("mean", HARD + shift)) for shift in (0.0, 0.5))
    pruned["units"]["text=a"]["figures"]["figure"]["values"].pop()
    assert not from_base(pruned, dense, "text=a")["figure"].paired
    del pruned["units"]
    assert not from_base(pruned, dense, "text=a")["figure"].paired


@pytest.mark.filterwarnings("ignore:overflow")
def test_pseudo_values_beyond_float64_are_no_units():
    measured = _measured("perplexity", np.linspace(0.0, 1e5, COUNT))
    assert not np.isfinite(measured.estimates["figure"].units).all()
    change = from_base(_entry(measured), _entry(measured), "text=a")["figure"]
    json.dumps(change.to_json(), allow_nan=False)
    assert not change.paired


@pytest.mark.parametrize(("higher", "expected"), [(True, "c"), (False, "a")])
def test_the_best_is_the_first_of_those_that_are_finished(higher, expected):
    def entry(key, value):
        return {"key": key, "status": "done", "metrics": {"e": {"value": value}}}

    entries = [{"status": "failed"}, *map(entry, "abcd", (1.0, 1.0, 2.0, 2.0))]
    assert best(entries, "e", higher)["key"] == expected
    assert best(entries[:1], "e", higher) is None


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (2.0441, (1.6, 2.489), "+2.04 (+1.60 to +2.49)"),
        (-0.5, (-1.25, 0.25), "-0.50 (-1.25 to +0.25)"),
        (0.012, (-0.00004, 0.024), "+0.0120 (-0.0000 to +0.0240)"),
        (0.000123, (0.0, 0.0003), "+0.000123 (+0 to +0.0003)"),
        (3.0, None, "+3.00"),
    ],
)
def test_a_difference_and_its_bounds_have_the_same_decimals(value, interval, shown):
    assert signed({"value": value, "confidence_interval": interval}) == shown

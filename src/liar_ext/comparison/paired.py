"""Paired differences in a grid: each cell from the dense model, and from the best of its rivals.

Of every figure the ledger keeps one pseudo-value for each unit (`evaluation.estimate`), so two
models are a pair however long ago one of them was measured, and what both find hard drops out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from liar_ext.comparison.grid import Cell
from liar_ext.evaluation.estimate import Difference, Estimate, difference
from liar_ext.evaluation.measured import Measured


def kept(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """What a ledger's entry keeps of one model's evaluations, by their names, as JSON data.

    Returns:
        `metrics`: `Measured.to_json`. `units`: the name of the units, and by metric their
        pseudo-values, one for each (none where they are unknown, or too large for JSON), and what
        one is worth that counts to a share.
    """
    return {
        "metrics": {name: one.to_json() for name, one in measured.items()},
        "units": {
            name: {
                "unit": one.unit,
                "figures": {metric: _units(figure) for metric, figure in one.estimates.items()},
            }
            for name, one in measured.items()
        },
    }


def _units(figure: Estimate) -> dict[str, Any]:
    finite = bool(np.isfinite(figure.units).all())
    return {"values": figure.units.tolist() if finite else [], "share_of": figure.share_of}


def from_base(
    entry: Mapping[str, Any], base: Mapping[str, Any], evaluation: str
) -> dict[str, Difference]:
    """`entry − base` of one evaluation, by metric; both entries of a ledger, with what `kept` says.

    A figure whose units are not kept, or are not as many, is no pair: its errors are taken as
    independent, for a grid that is measured must not be lost.
    """
    own, other = _estimates(entry, evaluation), _estimates(base, evaluation)
    unit = entry.get("units", {}).get(evaluation, {}).get("unit", "units")
    return {
        metric: difference(
            other[metric], one, unit, paired=len(other[metric].units) == len(one.units)
        )
        for metric, one in own.items()
        if metric in other
    }


def best(entries: Iterable[Mapping[str, Any]], evaluation: str, higher: bool) -> Any:
    """The first entry with the best figure; None where none is finished."""
    done = [entry for entry in entries if entry["status"] == "done"]
    pick = max if higher else min
    return pick(done, key=lambda entry: entry["metrics"][evaluation]["value"], default=None)


def rivals(cell: Cell) -> tuple[Any, ...]:
    """The same for cells that a reader chooses between: what is removed, and by what rule."""
    recipe = cell.recipe
    return tuple(recipe.target), recipe.allocation, recipe.sparsity


def _estimates(entry: Mapping[str, Any], evaluation: str) -> dict[str, Estimate]:
    """The figures of an entry, with their units where it keeps them."""
    kept_units = entry.get("units", {}).get(evaluation, {}).get("figures", {})
    found = {}
    for metric, one in entry["metrics"][evaluation]["estimates"].items():
        own = kept_units.get(metric, {"values": [], "share_of": None})
        interval = one["confidence_interval"]
        found[metric] = Estimate(
            value=one["value"],
            standard_error=one["standard_error"],
            interval=None if interval is None else (interval[0], interval[1]),
            method=one["interval_method"],
            units=np.asarray(own["values"], dtype=np.float64),
            share_of=own["share_of"],
        )
    return found

"""The result of a comparison: one JSON object, tables, plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.comparison.grid import Cell, Grid
from liar_ext.comparison.ledger import PLOTS, RESULT, TABLES, VERSION, Ledger, write_whole
from liar_ext.comparison.paired import best, from_base, rivals
from liar_ext.comparison.plots import draw
from liar_ext.comparison.tables import markdown
from liar_ext.environment import environment

if TYPE_CHECKING:
    from liar_ext.comparison.subject import Subject
    from liar_ext.evaluation.task import Evaluation

# of a ledger's entry: what the result says otherwise, or makes differences of
_INTERNAL = ("key", "recipe", "units")
# of a calibration: what says which text it was, not how to recognise it elsewhere
_CALIBRATION = ("source", "sha256", "seed", "seq_len", "samples", "tokens")


def assemble(
    source: str | Path,
    subject: Subject,
    grid: Grid,
    ledger: Ledger,
    identity: dict[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The whole result as JSON data; a cell that is the same computation as another says so.

    Every finished cell has, by evaluation, its `difference` from the dense model, by metric, and
    `from_best`, that of the main metric from the best cell of its target, allocation and sparsity
    (None for that one itself): `evaluation.estimate.Difference.to_json`.
    """
    cells: list[dict[str, Any]] = []
    first: dict[str, str] = {}
    beside_each: dict[Any, list[dict[str, Any]]] = {}
    for cell in grid.cells:
        beside_each.setdefault(rivals(cell), []).append(ledger.entries[cell.key])
    for cell in grid.cells:
        entry = {n: v for n, v in ledger.entries[cell.key].items() if n not in _INTERNAL}
        same = first.get(cell.key)
        first.setdefault(cell.key, cell.label)
        where = {**cell.coordinates, "variant": cell.variant, "same_as": same}
        beside = {}
        if entry["status"] == "done":
            beside = _differences(ledger, cell, beside_each[rivals(cell)], subject.evaluations)
        cells.append({**where, **entry, **beside, "recipe": cell.recipe.to_json()})
    computed = [ledger.entries[key] for key in first]
    counts = Counter(cell["status"] for cell in cells)
    calibration = subject.calibration.to_json()
    assert ledger.dense is not None, "it is measured before the cells"
    # a set of tasks has the metric that its first one has
    metrics = {name: one["metric"] for name, one in ledger.dense["metrics"].items()}
    return {
        "version": VERSION,
        "source": str(source),
        "axes": json.loads(json.dumps(grid.axes)),
        "recipe": grid.fixed(),
        "environment": environment(subject.device),
        "identity": identity,
        "calibration": {name: calibration[name] for name in _CALIBRATION},
        "evaluations": {
            e.name: {"metric": metrics[e.name], "higher": e.metric.higher, **e.identity()}
            for e in subject.evaluations
        },
        "dense": {n: v for n, v in ledger.dense.items() if n not in _INTERNAL},
        "cells": cells,
        "skipped": [{**where, "reason": reason} for where, reason in grid.skipped],
        "counts": {
            "done": counts["done"],
            "failed": counts["failed"],
            "skipped": len(grid.skipped),
            "computed": len(computed),
        },
        "seconds": sum(
            entry["seconds"]["total"] + entry["seconds"]["evaluation"]
            for entry in computed
            if entry["status"] == "done"
        ),
        "warnings": list(notes),
    }


def _differences(
    ledger: Ledger,
    cell: Cell,
    others: Sequence[dict[str, Any]],
    evaluations: Sequence[Evaluation],
) -> dict[str, Any]:
    """A finished cell's `difference` and `from_best`; `others`: entries of its rivals."""
    assert ledger.dense is not None, "it is measured before the cells"
    own = ledger.entries[cell.key]
    found: dict[str, dict[str, Any]] = {"difference": {}, "from_best": {}}
    for evaluation in evaluations:
        name = evaluation.name
        changes = from_base(own, ledger.dense, name)
        found["difference"][name] = {metric: one.to_json() for metric, one in changes.items()}
        first = best(others, name, evaluation.metric.higher)
        metric = own["metrics"][name]["metric"]
        found["from_best"][name] = (
            None if first is own else from_base(own, first, name)[metric].to_json()
        )
    return found


def write(folder: Path, result: dict[str, Any]) -> None:
    """The JSON, the tables and the plots, each replaced as a whole; plots that are no more go."""
    plots = draw(result)
    for path in folder.glob(PLOTS):
        if path.name not in plots:
            path.unlink()
    for name, svg in plots.items():
        write_whole(folder / name, svg)
    write_whole(folder / TABLES, markdown(result))
    write_whole(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")

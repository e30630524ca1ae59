"""Sections about how well the models work: evaluations, and grids of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liar_ext.errors import InputError
from liar_ext.report import plots_measured
from liar_ext.report.material import checked_evaluation
from liar_ext.report.outputs import PRUNED, Output
from liar_ext.report.page import Html, details, element, figure, join, paragraph, plots, table
from liar_ext.report.schema import RECOVERED
from liar_ext.report.text import NONE, budgeted, change, number, short_dataset, short_name

# a word of a metric's name that says that less of it is better
LOWER_IS_BETTER = ("perplexity", "loss", "kl", "divergence", "bits", "error", "brier")
MOST_LINES = 8
# of an evaluation, what its figure depends on beside the data set's name
CONDITIONS = ("sha256", "protocol", "seq_len", "windows")
# of an evaluation that does not say it
KINDS = {"perplexity": "text", "spearman": "stsb", "accuracy": "choices"}


@dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        dataset: as it is shown; key: all that two figures have to share to be compared.
        kind: of the evaluation, empty where it is not known.
        output: what it is of, None where that is not on the page; dense: whether it is of what an
            output was made from.
    """

    label: str
    metric: str
    dataset: str
    key: tuple[str, ...]
    kind: str
    value: float
    error: float | None
    dense: bool
    output: Output | None


def rows_of(evaluations: Sequence[Mapping[str, Any]], outputs: Sequence[Output]) -> list[Row]:
    """The evaluations, the dense model's first; raises InputError for a malformed one."""
    rows = [_row(checked_evaluation(one), outputs) for one in evaluations]
    return sorted(rows, key=lambda row: not row.dense)


def lower_is_better(metric: str) -> bool:
    return any(word in metric.lower() for word in LOWER_IS_BETTER)


def verdict(rows: Sequence[Row], output: Output) -> list[tuple[str, str, str]]:
    """Cards: each metric of one output, and how far from the dense model's it is."""
    found = []
    for row in rows:
        if row.output is not output:
            continue
        base = next((r for r in rows if r.dense and r.key == row.key), None)
        otherwise = any(r.dense and r.metric == row.metric for r in rows)
        note = f"the dense model was {'measured otherwise' if otherwise else 'not measured'}"
        if base is not None:
            note = f"{number(base.value, 4)} dense, {change(base.value, row.value)}"
        if row.dataset:
            note = f"{note}; {row.dataset}"
        found.append((row.metric[:1].upper() + row.metric[1:], number(row.value, 4), note))
    return found


def evaluated(rows: Sequence[Row], outputs: Sequence[Output]) -> Html:
    """All evaluations: bars, against what was removed where several outputs have one, a table."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    lines: list[list[str]] = []
    drawn: list[Html] = []
    for index, group in enumerate(groups.values()):
        base = next((row.value for row in group if row.dense), None)
        lines += [_line(row, base) for row in group]
        drawn += _group(group, base, f"quality-{index}", outputs)
    shown = table(
        "As measured by liar eval; ± is one standard error.",
        ["model", "metric", "data", "value", "standard error", "change"],
        lines,
        words=("model", "metric", "data"),
    )
    return join([plots(drawn), shown])


def _line(row: Row, base: float | None) -> list[str]:
    return [
        row.label,
        row.metric,
        row.dataset or NONE,
        number(row.value, 5),
        NONE if row.error is None else f"± {number(row.error)}",
        NONE if base is None or row.dense else change(base, row.value),
    ]


def _group(
    group: Sequence[Row], base: float | None, name: str, outputs: Sequence[Output]
) -> list[Html]:
    metric, dataset = group[0].metric, group[0].dataset
    better = "Lower" if lower_is_better(metric) else "Higher"
    on = f" on {dataset}" if dataset else ""
    bars = [{"label": r.label, "value": r.value, "error": r.error, "dense": r.dense} for r in group]
    drawn = [
        figure(
            plots_measured.bars(bars, metric, name),
            f"{metric}{on}. {better} is better; the whiskers are one standard error.",
        )
    ]
    points = [(row, removed) for row in group if (removed := _removed(row)) is not None]
    if len({id(row.output) for row, _ in points}) > 1:
        ways: dict[str, list[tuple[float, float, str]]] = {}
        for row, removed in points:
            said = f"{row.label}: {number(row.value, 5)} with {removed:.1f} % fewer parameters"
            ways.setdefault(_way(row.output), []).append((removed, row.value, said))
        if len(ways) <= MOST_LINES:
            axis = "parameters removed from the whole model, %", metric
            drawn.append(
                figure(
                    plots_measured.tradeoff(ways, base, axis, f"{name}-size"),
                    f"{metric}{on} against size, {len(outputs)} outputs. {better} is better.",
                )
            )
    return drawn


def _row(one: Mapping[str, Any], outputs: Sequence[Output]) -> Row:
    metric, source = str(one["metric"]), str(one["source"])
    dataset = str(one.get("dataset") or "")
    own = next((output for output in outputs if output.is_of(source)), None)
    of = next((output for output in outputs if output.from_source(source)), None)
    label = short_name(source)
    if own is not None:
        label, of = own.label, None
    elif of is not None:
        label = f"{label} ({'before' if of.kind == RECOVERED else 'dense'})"
    return Row(
        label,
        metric,
        ", ".join(map(short_dataset, dataset.split(", "))) if dataset else "",
        (metric, dataset, *(_condition(one.get(name)) for name in CONDITIONS)),
        str(one.get("kind") or KINDS.get(metric, "")),
        float(one["value"]),
        one.get("standard_error"),
        of is not None,
        own,
    )


def _condition(value: Any) -> str:
    """To compare; who chose the length, the user or a default, makes no other figure."""
    if isinstance(value, Mapping):
        value = {name: own for name, own in value.items() if name != "seq_len_from"}
    return json.dumps(value, sort_keys=True)


def _removed(row: Row) -> float | None:
    """Percent of the parameters that are gone."""
    if row.output is None or not row.output.totals.get("parameters_before"):
        return None
    totals = row.output.totals
    return 100 * (1 - float(totals["parameters_after"] / totals["parameters_before"]))


def _way(output: Output | None) -> str:
    """How it was made, without how much was removed."""
    assert output is not None, "a point is of an output"
    if output.kind != PRUNED:
        return {"layers": "whole layers"}.get(output.kind, output.kind)
    recipe = output.data["recipe"]
    parts = []
    if recipe.get("depth") or recipe.get("drop_layers"):
        parts.append("layers" if not recipe.get("depth") else f"layers by {recipe['depth']}")
    if recipe.get("sparsity", 1):
        parts.append(f"{recipe['criterion']}, {recipe['allocation']}, {recipe['reconstruct']}")
    return " + ".join(parts)


def grid(result: Mapping[str, Any], place: int) -> Html:
    """A grid of `liar compare`: quality against sparsity, and every cell in a table.

    Raises:
        InputError: the grid is of another release, or was edited.
    """
    try:
        return _compared(result, place)
    except KeyError as error:
        raise InputError(
            f"--compare of {short_name(str(result['source']))}: has no {error}; make it again with "
            "`liar compare` of this release"
        ) from error


def _compared(result: Mapping[str, Any], place: int) -> Html:
    from liar_ext.comparison.tables import groups

    parts: list[str] = []
    plain = dict(result)
    for at, group in enumerate(groups(plain)):
        done = [cell for cell in group.cells if cell["status"] == "done"]
        parts.append(element("h3", f"{short_name(str(result['source']))}: {group.title}"))
        drawn: list[Html] = []
        tables: list[Html] = []
        for number_, (name, evaluation) in enumerate(result["evaluations"].items()):
            dense = result["dense"]["metrics"][name]
            on = f" on {short_name(str(dense.get('dataset') or name))}"
            metric = str(evaluation["metric"])
            better = "Higher" if evaluation["higher"] else "Lower"
            if done:
                lines, cut = _lines(done, name, higher=bool(evaluation["higher"]))
                axis = f"share of the targeted {budgeted(result['recipe'])} removed, %", metric
                plot = plots_measured.tradeoff(
                    lines, dense["value"], axis, f"grid-{place}-{at}-{number_}"
                )
                best = (
                    " Of each repair the best criterion at each sparsity is shown." if cut else ""
                )
                drawn.append(figure(plot, f"{metric}{on}. {better} is better.{best}"))
            tables.append(_cells(group.cells, name, f"{metric}{on}", bool(evaluation["higher"])))
        parts += [plots(drawn), details("All cells", join(tables))]
    failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
    if failed:
        parts.append(paragraph(f"{len(failed)} cells failed: {failed[0].get('error', '')}"))
    return join(parts)


def _lines(
    cells: Sequence[Mapping[str, Any]], name: str, *, higher: bool
) -> tuple[dict[str, list[tuple[float, float, str]]], bool]:
    """Points by the method; by the repair alone, the best of each, where there are too many."""

    def point(cell: Mapping[str, Any]) -> tuple[float, float, str]:
        value, removed = cell["metrics"][name]["value"], 100 * cell["sparsity_reached"]
        said = f"{cell['criterion']}, {cell['variant']}: {number(value, 5)} at {removed:.1f} %"
        return removed, value, said

    lines: dict[str, list[tuple[float, float, str]]] = {}
    for cell in cells:
        lines.setdefault(f"{cell['criterion']}, {cell['variant']}", []).append(point(cell))
    if len(lines) <= MOST_LINES:
        return lines, False
    best: dict[str, dict[float, tuple[float, float, str]]] = {}
    for cell in cells:
        own, at = best.setdefault(str(cell["variant"]), {}), cell["sparsity"]
        found = point(cell)
        if at not in own or (found[1] > own[at][1]) is higher:
            own[at] = found
    return {way: list(points.values()) for way, points in list(best.items())[:MOST_LINES]}, True


def _cells(cells: Sequence[Mapping[str, Any]], name: str, caption: str, higher: bool) -> Html:
    sparsities = list(dict.fromkeys(cell["sparsity"] for cell in cells))
    ways = list(dict.fromkeys((cell["criterion"], cell["variant"]) for cell in cells))
    found = {
        (cell["criterion"], cell["variant"], cell["sparsity"]): cell["metrics"][name]["value"]
        for cell in cells
        if cell["status"] == "done"
    }
    best = {
        at: (max if higher else min)(values)
        for at in sparsities
        if (values := [value for key, value in found.items() if key[2] == at])
    }
    rows = []
    for way in ways:
        row: list[str] = [way[0], way[1]]
        for at in sparsities:
            value = found.get((*way, at))
            text = number(value, 5)
            row.append(element("strong", text) if value is not None and value == best[at] else text)
        rows.append(row)
    head = ["criterion", "repair", *(f"{100 * at:g} %" for at in sparsities)]
    return table(f"{caption}; the best of each sparsity in bold.", head, rows, words=("repair",))

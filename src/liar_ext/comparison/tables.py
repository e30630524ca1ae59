"""A comparison as Markdown: one table for each target and allocation, the best in bold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from liar_ext.report.text import NONE, budgeted, number, percent, short_name, signed

Cell = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    env, calibration = result["environment"], result["calibration"]
    recipe, counts = result["recipe"], result["counts"]
    lines = [
        f"# Comparison: {short_name(result['source'])}",
        "",
        f"{calibration['tokens']:,} calibration tokens of {short_name(calibration['source'])}, "
        f"{recipe['statistics']} statistics, seed {recipe['seed']}; torch {env['torch']}, "
        f"transformers {env['transformers']}, liar-ext {env['liar_ext']}, on {env['device']}.",
        "",
    ]
    for name, evaluation in result["evaluations"].items():
        dense = result["dense"]["metrics"][name]
        better = "higher" if evaluation["higher"] else "lower"
        lines.append(
            f"- {_shown_metric(evaluation['metric'])} on {short_name(dense['dataset'])} ({better} "
            f"is better): dense **{_value(dense)}**{_spread(dense)}"
        )
    lines += [
        "",
        "In brackets: mean relative residual of the Sites on the calibration tokens. Bold: the "
        "best of a sparsity; ≈: the interval of its difference from that one holds 0. `%` is the "
        f"share of the targeted {budgeted(result['recipe'])} that was asked for; where units allow "
        "only another, the one reached is in brackets. Differences are of the same samples; each "
        "interval is of one difference, and of many some miss.",
    ]
    several = len(result["evaluations"]) > 1
    for group in groups(result):
        lines += ["", f"## {group.title}"]
        for name, evaluation in result["evaluations"].items():
            if several:
                lines += ["", f"### {_shown_metric(evaluation['metric'])}, {short_name(name)}"]
            if any(cell["status"] == "done" for cell in group.cells):
                lines += ["", f"![plot]({group.plot(result, name)})"]
            lines += [""]
            lines += _table(group.cells, name, evaluation["higher"])
            lines += _changes(group.cells, name)
    lines += _cost(result)
    if counts["failed"]:
        lines += ["", "## Failed", ""]
        lines += [
            f"- {_where(cell)}: {cell['error']}"
            for cell in result["cells"]
            if cell["status"] == "failed"
        ]
    if result["skipped"]:
        lines += ["", "## Not possible", ""]
        lines += [f"- {_where(entry)}: {entry['reason']}" for entry in result["skipped"]]
    warned = _warned(result["cells"])
    if result["warnings"] or warned:
        lines += ["", "## Warnings", "", *(f"- {text}" for text in result["warnings"]), *warned]
    return "\n".join(lines) + "\n"


def _warned(cells: Sequence[Cell]) -> list[str]:
    """Warnings of cells; one that many have, as of a ridge that was raised, is there once."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        for text in dict.fromkeys(cell.get("warnings", ())):
            found.setdefault(text, []).append(cell)
    return [
        f"- {_where(own[0])}{f' and {len(own) - 1} more' if len(own) > 1 else ''}: {text}"
        for text, own in found.items()
    ]


class Group:
    """The cells of one target and one allocation. Attributes: `target`, `allocation`, `cells`."""

    def __init__(self, target: Sequence[str], allocation: str, cells: list[Cell]) -> None:
        self.target, self.allocation, self.cells = tuple(target), allocation, cells

    @property
    def title(self) -> str:
        kinds = " + ".join(kind.replace("ffn", "FFN") for kind in self.target)
        return f"{kinds}, {self.allocation}"

    def plot(self, result: dict[str, Any], evaluation: str) -> str:
        """The name of its plot's file."""
        number = list(result["evaluations"]).index(evaluation)
        suffix = f"-{number + 1}" if len(result["evaluations"]) > 1 else ""
        return f"plot-{'-'.join(self.target)}-{self.allocation}{suffix}.svg"


def groups(result: dict[str, Any]) -> Iterator[Group]:
    """The cells by target and allocation, in the order of the axes."""
    for target in result["axes"]["targets"]:
        for allocation in result["axes"]["allocations"]:
            cells = [
                cell
                for cell in result["cells"]
                if cell["target"] == target and cell["allocation"] == allocation
            ]
            if cells:
                yield Group(target, allocation, cells)


def best_of(cells: Sequence[Cell], evaluation: str, higher: bool) -> float | None:
    values = [c["metrics"][evaluation]["value"] for c in cells if c["status"] == "done"]
    return (max if higher else min)(values, default=None)


def _table(cells: Sequence[Cell], evaluation: str, higher: bool) -> list[str]:
    def entries(of_sparsity: Sequence[Cell]) -> Callable[[Cell | None], str]:
        best = best_of(of_sparsity, evaluation, higher)
        return lambda cell: _entry(cell, evaluation, best)

    return _filled(cells, entries)


def _filled(
    cells: Sequence[Cell], entries: Callable[[Sequence[Cell]], Callable[[Cell | None], str]]
) -> list[str]:
    """A row a sparsity and criterion, a column a variant.

    Args:
        entries: given the cells of one sparsity, what says what is in a place: that of a cell, or
            of None where there is none.
    """
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    lines = [
        "| removed | criterion | " + " | ".join(variants) + " |",
        "|---|---|" + "---|" * len(variants),
    ]
    for sparsity in dict.fromkeys(cell["sparsity"] for cell in cells):
        of_sparsity = [cell for cell in cells if cell["sparsity"] == sparsity]
        entry = entries(of_sparsity)
        for criterion in dict.fromkeys(cell["criterion"] for cell in of_sparsity):
            row = {c["variant"]: c for c in of_sparsity if c["criterion"] == criterion}
            shown = [entry(row.get(variant)) for variant in variants]
            removed = _removed(sparsity, list(row.values()))
            lines.append(f"| {removed} | {criterion} | " + " | ".join(shown) + " |")
    return lines


def _entry(cell: Cell | None, evaluation: str, best: float | None) -> str:
    if cell is None:
        return NONE
    if cell["status"] == "failed":
        return "failed"
    measured = cell["metrics"][evaluation]
    value = _value(measured)
    if measured["value"] == best:
        value = f"**{value}**"
    elif _holds_nothing(cell["from_best"][evaluation]):
        value = f"{value} ≈"
    return f"{value} ({cell['residual']['mean']:.3f})"


def _changes(cells: Sequence[Cell], evaluation: str) -> list[str]:
    """The differences from the dense model, with their intervals, in the places of the values."""
    done = [cell for cell in cells if cell["status"] == "done"]
    if not done:
        return []
    metric = done[0]["metrics"][evaluation]["metric"]
    changes = [cell["difference"][evaluation][metric] for cell in done]
    methods = dict.fromkeys(change["interval_method"] for change in changes)
    table = _filled(cells, lambda _: lambda cell: _change(cell, evaluation, metric))
    return ["", f"Difference from dense ({'; '.join(methods)}):", "", *table]


def _change(cell: Cell | None, evaluation: str, metric: str) -> str:
    if cell is None:
        return NONE
    if cell["status"] == "failed":
        return "failed"
    return signed(cell["difference"][evaluation][metric])


def _holds_nothing(change: dict[str, Any] | None) -> bool:
    """Whether the interval of a difference holds 0."""
    interval = None if change is None else change["confidence_interval"]
    return interval is not None and interval[0] <= 0 <= interval[1]


def _removed(sparsity: float, cells: Sequence[Cell]) -> str:
    reached = [cell["sparsity_reached"] for cell in cells if cell["status"] == "done"]
    away = [value for value in reached if abs(value - sparsity) > 0.01]
    asked = f"{100 * sparsity:g} %"
    return f"{asked} ({percent(max(away), 0)})" if away else asked


def _cost(result: dict[str, Any]) -> list[str]:
    """Median cost of a computation by criterion and variant."""
    done = [c for c in result["cells"] if c["status"] == "done" and c["same_as"] is None]
    if not done:
        return []
    variants = list(dict.fromkeys(cell["variant"] for cell in done))
    lines = [
        "",
        "## Cost",
        "",
        f"{result['counts']['computed']} computations in {result['seconds']:.0f} s, evaluation "
        "included. Median compression time over one plain forward of the same tokens "
        f"({result['dense']['forward_seconds']:.2f} s); the cell that takes the statistics for "
        "others has all of their cost.",
        "",
        "| criterion | " + " | ".join(variants) + " |",
        "|---|" + "---|" * len(variants),
    ]
    for criterion in dict.fromkeys(cell["criterion"] for cell in done):
        shown = []
        for variant in variants:
            found = sorted(
                cell["relative_to_forward"]
                for cell in done
                if cell["criterion"] == criterion and cell["variant"] == variant
            )
            shown.append(f"{found[len(found) // 2]:.2f}" if found else NONE)
        lines.append(f"| {criterion} | " + " | ".join(shown) + " |")
    return lines


def _value(measured: dict[str, Any]) -> str:
    value = measured["value"]
    return f"{value:.2f}" if abs(value) < 1e4 else number(value, 4)


def _spread(measured: dict[str, Any]) -> str:
    error = measured["standard_error"]
    return "" if error is None else f" (standard error {number(error, 2)})"


def _shown_metric(name: str) -> str:
    return {"spearman": "Spearman × 100", "accuracy": "accuracy, %"}.get(name, name)


def _where(entry: dict[str, Any]) -> str:
    parts = [",".join(entry["target"]), entry["allocation"], f"{entry['sparsity']:g}"]
    parts += [entry["criterion"], entry["reconstruct"], f"ridge {entry['ridge']}"]
    aim = entry.get("target_signal", "local")
    return " ".join(parts if aim == "local" else [*parts, f"target {aim}"])

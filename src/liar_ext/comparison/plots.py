"""A comparison's figures: loss or score against sparsity, one SVG for each target and allocation.

Files of their own, in the style of `report.drawing` with fixed colours: a page that shows them as
images has no say in them. Colour tells the criterion, marker and dashes the reconstruction.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from liar_ext.comparison.tables import Cell, Group, groups
from liar_ext.report.drawing import FAINT, INK, STYLE
from liar_ext.report.text import budgeted

_COLOURS = {INK: "#222222", FAINT: "#d8d8d8"}
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(result: dict[str, Any]) -> dict[str, str]:
    """SVG text by file name."""
    return {
        group.plot(result, name): _plot(result, group, name)
        for group in groups(result)
        for name in result["evaluations"]
        if any(cell["status"] == "done" for cell in group.cells)
    }


def _plot(result: dict[str, Any], group: Group, evaluation: str) -> str:
    measured = result["dense"]["metrics"][evaluation]
    field = "loss" if "loss" in measured else "value"
    cells = [cell for cell in group.cells if cell["status"] == "done"]
    criteria = list(dict.fromkeys(cell["criterion"] for cell in cells))
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    colours = matplotlib.colormaps["tab10" if len(criteria) <= 10 else "tab20"]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": group.title + evaluation}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for c, criterion in enumerate(criteria):
            for v, variant in enumerate(variants):
                own = [x for x in cells if x["criterion"] == criterion and x["variant"] == variant]
                points = sorted({_point(cell, evaluation, field) for cell in own})
                if points:
                    axes.plot(
                        [x for x, _ in points],
                        [y for _, y in points],
                        linestyle=_DASHES[v % len(_DASHES)],
                        marker=_MARKERS[v % len(_MARKERS)],
                        markersize=4,
                        linewidth=1.2,
                        color=colours(c % colours.N),
                        label=f"{criterion}, {variant}",
                    )
        dense = measured[field]
        axes.axhline(dense, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="dense")
        axes.set_xlabel(f"share of the targeted {budgeted(result['recipe'])} removed, %")
        axes.set_ylabel("loss, nats" if field == "loss" else measured["metric"])
        axes.set_title(group.title, fontsize=10)
        figure.legend(loc="outside right upper", fontsize=7)
        return _svg(figure)


def _point(cell: Cell, evaluation: str, field: str) -> tuple[float, float]:
    return 100 * cell["sparsity_reached"], cell["metrics"][evaluation][field]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"

"""Plots of what was measured of models: evaluations, grids, serving and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from liar_ext.report.drawing import (
    DASHES,
    FAINT,
    INK,
    MARKERS,
    SERIES,
    Drawing,
    legend_above,
    literal,
)
from liar_ext.report.text import number


def bars(
    rows: Sequence[Mapping[str, Any]],
    label: str,
    name: str,
    show: Callable[[float], str] = lambda value: number(value, 5),
) -> str:
    """One figure of several models as bars.

    Args:
        rows: `label`, `value`, and `error` (its standard error) and `dense`, where they are known,
            in the order of the bars; the dense model's is grey.
        label: of the axis; name: unique on the page.
        show: how a value is written at its bar.
    """
    with Drawing(name, 1, 0.9 + 0.36 * len(rows)) as drawing:
        (axes,) = drawing.panels
        places = list(range(len(rows)))
        errors = [row.get("error") for row in rows]
        drawn = axes.barh(
            places,
            [row["value"] for row in rows],
            0.6,
            color=[FAINT if row.get("dense") else SERIES[0] for row in rows],
            xerr=None
            if all(error is None for error in errors)
            else [math.nan if error is None else error for error in errors],
            ecolor=INK,
            capsize=3,
        )
        axes.bar_label(drawn, [show(row["value"]) for row in rows], padding=6)
        for bar, row in zip(drawn, rows, strict=True):
            drawing.say(bar, f"{row['label']}: {show(row['value'])}")
        axes.set_yticks(places, [literal(row["label"], 24) for row in rows])
        axes.margins(x=0.24)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(literal(label, 60))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return drawing.svg(f"{label} of each model")


def tradeoff(
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    dense: float | None,
    axis: tuple[str, str],
    name: str,
) -> str:
    """Quality against what was removed, a line for each way of removing it.

    Args:
        lines: by name, points (percent removed, value, what the point says); at most eight lines.
        dense: the dense model's value, a dotted line; None where it is not known.
        axis: what x and y are; name: unique on the page.
    """
    with Drawing(name, 1, 3.3) as drawing:
        (axes,) = drawing.panels
        for place, (label, points) in enumerate(lines.items()):
            ordered = sorted(points)
            colour, marker = SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]
            axes.plot(
                [x for x, *_ in ordered],
                [y for _, y, _ in ordered],
                linestyle=DASHES[place % len(DASHES)],
                marker=marker,
                markersize=5,
                linewidth=1.2,
                color=colour,
                label=literal(label),
            )
            for x, y, said in ordered:
                (point,) = axes.plot([x], [y], marker, markersize=6, color=colour)
                drawing.say(point, said)
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="dense")
        # nothing removed is where the dense model is
        axes.set_xlim(left=0)
        axes.set_xlabel(literal(axis[0], 60))
        axes.set_ylabel(literal(axis[1], 40))
        legend_above(axes, 2)
        return drawing.svg(f"{axis[1]} against {axis[0]}")


def training(looks: Sequence[Mapping[str, Any]], kept: int | None, name: str) -> str | None:
    """Held-out loss by step; None where it was looked at less than twice."""
    if len(looks) < 2:
        return None
    with Drawing(name, 1, 2.6) as drawing:
        (axes,) = drawing.panels
        steps, losses = [look["step"] for look in looks], [look["loss"] for look in looks]
        axes.plot(steps, losses, "-", linewidth=1.2, color=SERIES[0])
        for step, loss in zip(steps, losses, strict=True):
            own = step == kept
            (point,) = axes.plot(
                [step],
                [loss],
                "s" if own else "o",
                markersize=8 if own else 5,
                color=SERIES[1 if own else 0],
            )
            drawing.say(point, f"step {step}: loss {number(loss, 5)}{', kept' * own}")
        axes.set_xlabel("updates")
        axes.set_ylabel("held-out loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return drawing.svg("Loss on held-out windows during the training")

"""Plots as inline SVG: no script, no network, and colours that the page decides.

matplotlib writes fixed colours; here it draws with placeholders that become `currentColor` and CSS
variables, so that the same plot is readable on a light and on a dark page. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import duration, number

INK, FAINT = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505")
# what the placeholders become; the variables are in template.html
COLOURS = {INK: "currentColor", FAINT: "var(--faint)"} | {
    name: f"var(--series-{i})" for i, name in enumerate(SERIES)
}
# the stubs of matplotlib spell out every key
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    # nothing may keep a colour of matplotlib's own, not even the caps of error bars
    "axes.prop_cycle": cycler(color=[INK]),
}
LABELS = {"ffn": "FFN neurons", "heads": "heads"}
# a kind keeps its colour and marker from plot to plot
PLACES = {"heads": 0, "ffn": 1}
MARKERS = ("o", "s", "^")
WIDTH = 6.4  # inches


def widths(report: Report) -> str | None:
    """Units per layer before and after, one panel for each kind of Site; None where all stayed."""
    if all(s.units_after == s.units_before for s in report.sites):
        return None
    groups = _by_kind(report.sites)
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(groups), 2.3)
        for axes, (kind, sites) in zip(panels, groups.items(), strict=True):
            layers, colour = [s.layer for s in sites], SERIES[_place(kind)]
            axes.bar(layers, [s.units_before for s in sites], 0.8, color=FAINT, label="before")
            axes.bar(layers, [s.units_after for s in sites], 0.5, color=colour, label="after")
            axes.set_ylabel(LABELS.get(kind, kind))
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
            _layer_axis(axes)
        return _svg(figure, "widths", "Units kept in each layer, before and after")


def residual(report: Report) -> str | None:
    """Relative residual of each Site; None where none is known."""
    known = [s for s in report.sites if s.relative_residual is not None]
    if not known:
        return None
    values = [s.relative_residual for s in known]
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1, 2.8)
        _scatter(axes, known, [100 * v for v in values])
        _scale(axes, values)
        axes.set_ylabel("relative residual, %")
        return _svg(figure, "residual", "Relative residual of each Site")


def time_split(report: Report) -> str:
    """Seconds by phase; what no phase claims is `other`."""
    seconds = {k: v for k, v in report.seconds.items() if k != "total"}
    seconds["other"] = max(report.seconds.get("total", 0.0) - sum(seconds.values()), 0.0)
    whole = max(sum(seconds.values()), 1e-9)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1, 0.7 + 0.3 * len(seconds))
        bars = axes.barh(list(seconds), list(seconds.values()), 0.7, color=SERIES[0])
        texts = [f"{duration(v)} · {100 * v / whole:.0f} %" for v in seconds.values()]
        axes.bar_label(bars, texts, padding=4)
        axes.set_xlim(0, 1.3 * max(*seconds.values(), 1e-9))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        return _svg(figure, "time", "Seconds spent in each phase")


def solves(report: Report) -> str | None:
    """Ridge used and condition of each solved Site; None where nothing was solved."""
    solved = [s for s in report.sites if s.ridge_used is not None]
    if not solved:
        return None
    conditioned = [s for s in solved if s.condition is not None]
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(2 if conditioned else 1, 2.0)
        ridges = [s.ridge_used or 0.0 for s in solved]
        _scatter(panels[0], solved, ridges)
        if min(ridges) > 0:
            panels[0].set_yscale("log")
        panels[0].set_ylabel("ridge used")
        if conditioned:
            found = [s.condition or 1.0 for s in conditioned]
            _scatter(panels[1], conditioned, found, legend=False)
            _scale(panels[1], found)
            panels[1].set_ylabel("condition")
        return _svg(figure, "solves", "Ridge used and condition of each Site's system")


def evaluation(rows: Sequence[Mapping[str, Any]], metric: str, index: int) -> str:
    """One metric of several models as bars.

    Args:
        rows: `label`, `value` and `error` (None where unknown), in the order of the bars.
        index: makes the plot's ids unique on the page.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _panels(1, 0.9 + 0.4 * len(rows))
        places = range(len(rows))
        bars = axes.barh(
            places,
            [r["value"] for r in rows],
            0.6,
            color=SERIES[0],
            xerr=[math.nan if r["error"] is None else r["error"] for r in rows],
            ecolor=INK,
            capsize=3,
        )
        axes.bar_label(bars, [number(r["value"], 5) for r in rows], padding=6)
        axes.set_yticks(list(places), [_literal(r["label"]) for r in rows])
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_literal(metric))
        return _svg(figure, f"evaluation-{index}", f"{metric} of each model")


def _by_kind(sites: Sequence[SiteReport]) -> dict[str, list[SiteReport]]:
    kinds = dict.fromkeys(s.kind for s in sites)
    return {kind: [s for s in sites if s.kind == kind] for kind in kinds}


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, max(count, 1) * height), layout="constrained")
    grid = figure.subplots(max(count, 1), 1, squeeze=False)
    return figure, list(grid[:, 0])


def _scatter(
    axes: Axes, sites: Sequence[SiteReport], values: Sequence[float], *, legend: bool = True
) -> None:
    pairs = list(zip(sites, values, strict=True))
    for kind in _by_kind(sites):
        place = _place(kind)
        own = [(s.layer, v) for s, v in pairs if s.kind == kind]
        # markers differ too: colour alone does not reach every reader
        axes.plot(
            [x for x, _ in own],
            [y for _, y in own],
            MARKERS[place] + "-",
            markersize=5,
            linewidth=1,
            color=SERIES[place],
            label=LABELS.get(kind, kind),
        )
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    _layer_axis(axes)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values are of different magnitude, else from zero."""
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _place(kind: str) -> int:
    return PLACES.get(kind, len(PLACES))


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def _literal(text: str) -> str:
    """Text that matplotlib shall not read as a formula."""
    short = text if len(text) <= 40 else f"{text[:18]}…{text[-20:]}"
    return short.replace("$", r"\$")


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element: no prolog, unique ids, the page's colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#)|(url\(#)', lambda m: f"{m[0]}{name}-", text)
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    # the page's own font: releases of matplotlib write it in two ways
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib states a viewBox"
    head = (
        f'<svg {box[0]} role="img" aria-labelledby="{name}-title">'
        f'<title id="{name}-title">{escape(title)}</title>'
    )
    return head + text[text.index(">") + 1 :].strip()

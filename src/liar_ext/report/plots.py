"""Plots of one compression, from its Report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from liar_ext.report.drawing import (
    FAINT,
    MARKERS,
    SERIES,
    Drawing,
    layer_axis,
    legend_above,
    scale,
)
from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import duration, number, percent

LABELS = {"ffn": "FFN neurons", "heads": "heads"}
# a kind keeps its colour and marker from plot to plot
PLACES = {"heads": 0, "ffn": 1}


def widths(report: Report, name: str = "widths") -> str | None:
    """Units per layer before and after, one panel for each kind of Site; None where all stayed.

    Args:
        name: of the plot, unique on the page, as below.
    """
    if all(s.units_after == s.units_before for s in report.sites):
        return None
    groups = _by_kind(report.sites)
    with Drawing(name, len(groups), 2.1) as drawing:
        for axes, (kind, sites) in zip(drawing.panels, groups.items(), strict=True):
            layers, colour = [s.layer for s in sites], SERIES[_place(kind)]
            axes.bar(layers, [s.units_before for s in sites], 0.8, color=FAINT, label="before")
            bars = axes.bar(
                layers, [s.units_after for s in sites], 0.5, color=colour, label="after"
            )
            for bar, site in zip(bars, sites, strict=True):
                units = f"{site.units_before:,} to {site.units_after:,} units"
                drawing.say(bar, f"layer {site.layer}, {kind}: {units}")
            axes.set_ylabel(LABELS.get(kind, kind))
            legend_above(axes, 2)
            layer_axis(axes)
        return drawing.svg("Units kept in each layer, before and after")


def residual(report: Report, name: str = "residual") -> str | None:
    """Relative residual of each Site; None where none is known."""
    known = [s for s in report.sites if s.relative_residual is not None]
    if not known:
        return None
    values = [s.relative_residual for s in known]
    with Drawing(name, 1, 2.8) as drawing:
        (axes,) = drawing.panels
        told = [percent(v, 2) for v in values]
        _scatter(drawing, axes, known, [100 * v for v in values], told)
        scale(axes, values)
        axes.set_ylabel("relative residual, %")
        return drawing.svg("Relative residual of each Site")


def phases(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase; what no phase claims is `other`."""
    own = {k: v for k, v in seconds.items() if k != "total" and v}
    own["other"] = max(seconds.get("total", 0.0) - sum(own.values()), 0.0)
    return own


def time_split(seconds: Mapping[str, float], name: str = "time") -> str:
    """Seconds by phase, as `phases` gives them."""
    whole = max(sum(seconds.values()), 1e-9)
    with Drawing(name, 1, 0.7 + 0.3 * len(seconds)) as drawing:
        (axes,) = drawing.panels
        bars = axes.barh(list(seconds), list(seconds.values()), 0.7, color=SERIES[0])
        texts = [f"{duration(v)} · {100 * v / whole:.0f} %" for v in seconds.values()]
        axes.bar_label(bars, texts, padding=4)
        axes.set_xlim(0, 1.4 * max(*seconds.values(), 1e-9))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        return drawing.svg("Seconds spent in each phase")


def solves(report: Report, name: str = "solves") -> str | None:
    """Ridge used and condition of each solved Site; None where nothing was solved."""
    solved = [s for s in report.sites if s.ridge_used is not None]
    if not solved:
        return None
    conditioned = [s for s in solved if s.condition is not None]
    with Drawing(name, 2 if conditioned else 1, 2.0) as drawing:
        panels = drawing.panels
        ridges = [s.ridge_used or 0.0 for s in solved]
        _scatter(drawing, panels[0], solved, ridges, [f"ridge {number(r)}" for r in ridges])
        if min(ridges) > 0:
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_formatter(lambda value, _: number(value))
        panels[0].set_ylabel("ridge used")
        if conditioned:
            found = [s.condition or 1.0 for s in conditioned]
            told = [f"condition {number(c)}" for c in found]
            _scatter(drawing, panels[1], conditioned, found, told, legend=False)
            scale(panels[1], found)
            panels[1].set_ylabel("condition")
        return drawing.svg("Ridge used and condition of each Site's system")


def layer_measures(layers: Mapping[str, Any], name: str = "layers") -> str | None:
    """What was measured of each layer, one panel for each measure; None where nothing was."""
    measured = {
        label: dict(enumerate(values)) for label, values in layers.get("measured", {}).items()
    }
    if steps := layers.get("steps"):
        measured["loss once it had gone"] = {s["layer"]: s["loss"] for s in steps}
    if not measured:
        return None
    gone = set(layers.get("dropped", ()))
    gone |= set(range(ends[0], ends[1] + 1)) if (ends := layers.get("replaced")) else set()
    with Drawing(name, len(measured), 2.1) as drawing:
        for axes, (label, values) in zip(drawing.panels, measured.items(), strict=True):
            for went, word, colour in ((False, "kept", FAINT), (True, "gone", SERIES[1])):
                own = {at: v for at, v in values.items() if (at in gone) is went}
                bars = axes.bar(list(own), list(own.values()), 0.7, color=colour, label=word)
                for bar, (at, value) in zip(bars, own.items(), strict=True):
                    drawing.say(bar, f"layer {at}, {word}: {label} {number(value, 4)}")
            axes.set_ylabel(label)
            legend_above(axes, 2)
            layer_axis(axes)
        return drawing.svg("What was measured of each layer")


def _by_kind(sites: Sequence[SiteReport]) -> dict[str, list[SiteReport]]:
    kinds = dict.fromkeys(s.kind for s in sites)
    return {kind: [s for s in sites if s.kind == kind] for kind in kinds}


def _scatter(
    drawing: Drawing,
    axes: Axes,
    sites: Sequence[SiteReport],
    values: Sequence[float],
    told: Sequence[str],
    *,
    legend: bool = True,
) -> None:
    rows = list(zip(sites, values, told, strict=True))
    for kind in _by_kind(sites):
        place = _place(kind)
        own = [row for row in rows if row[0].kind == kind]
        axes.plot(
            [site.layer for site, *_ in own],
            [value for _, value, _ in own],
            MARKERS[place] + "-",
            markersize=5,
            linewidth=1,
            color=SERIES[place],
            label=LABELS.get(kind, kind),
        )
        for site, value, text in own:
            # one by one, so that each can say what it is
            (point,) = axes.plot(
                [site.layer], [value], MARKERS[place], markersize=5, color=SERIES[place]
            )
            drawing.say(point, f"layer {site.layer}, {kind}: {text}")
    if legend:
        legend_above(axes, 3)
    layer_axis(axes)


def _place(kind: str) -> int:
    return PLACES.get(kind, len(PLACES))

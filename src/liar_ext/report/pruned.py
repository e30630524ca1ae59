"""Sections about a folder that was pruned Site by Site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from liar_ext.report import plots
from liar_ext.report.card import SITE_NAMES
from liar_ext.report.page import Html, details, element, figure, join, records, table
from liar_ext.report.page import plots as grid
from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import NONE, duration, layers, number, percent, ridge, workload


def happened(report: Report, name: str) -> Html:
    """What was done and what it did, as plots and tables; `name` is unique on the page."""
    return join(
        [
            _drawn(report, name),
            layers_measured(report.layers, f"{name}-layers"),
            _sites(report),
            details(
                "Recipe: everything that was asked for",
                records("Recipe, the same as recipe.json.", report.recipe),
            ),
            _calibration(report),
            _latency(report),
            details(
                "Environment and run",
                join(
                    [
                        records("Versions and device of the run.", report.environment),
                        records("How it ran; nothing here changes the result.", report.run)
                        if report.run
                        else "",
                    ]
                ),
            ),
        ]
    )


def _drawn(report: Report, name: str) -> Html:
    seconds = plots.phases(report.seconds)
    times = table(
        "Seconds by phase.",
        ["phase", "seconds"],
        [[phase, number(value, 4)] for phase, value in seconds.items()],
    )
    of = (
        "One unit of the heads is one head, or a key/value head with the query heads that share it."
    )
    return grid(
        [
            figure(
                plots.widths(report, f"{name}-widths"),
                f"Units of each layer: grey before, coloured after. {of}",
            ),
            figure(
                plots.residual(report, f"{name}-residual"),
                "Relative residual: mean squared error of the repaired consumer's output over the "
                "variance of the dense one's, on the calibration tokens. 0 is a perfect repair; "
                "100 % is a layer that outputs its mean. A diagnostic, not a quality.",
            ),
            figure(
                plots.solves(report, f"{name}-solves"),
                "Ridge used, relative to the mean variance of the Site's columns (asked for: "
                f"{ridge(report.recipe.get('ridge'))}), and condition of the scaled system with "
                "its ridge.",
            ),
            figure(
                plots.time_split(seconds, f"{name}-time"),
                "forward runs the calibration tokens through the model once (and once more each "
                "with an allocation that needs scores and for a dense target); gram and solve are "
                "the price of the repair.",
                times,
            ),
        ]
    )


def layers_measured(of: dict[str, Any], name: str) -> Html:
    """Of whole layers: a plot and a table of what the choice went by; empty where none was."""
    columns: dict[str, dict[int, float]] = {
        label: dict(enumerate(values)) for label, values in of.get("measured", {}).items()
    }
    # of a method that takes one layer at a time
    steps = of.get("steps", [])
    if steps:
        columns["loss once it had gone"] = {step["layer"]: step["loss"] for step in steps}
    if not columns:
        return Html("")
    went = {s["layer"]: f"left out ({at} of {len(steps)})" for at, s in enumerate(steps, 1)}
    gone = {at: went.get(at, "left out") for at in of.get("dropped", ())}
    if ends := of.get("replaced"):
        gone |= dict.fromkeys(range(ends[0], ends[1] + 1), "replaced")
    rows = [
        [
            str(at),
            *(number(found[at]) if at in found else NONE for found in columns.values()),
            gone.get(at, "kept"),
        ]
        for at in range(of["before"])
    ]
    caption = (
        "Layers of the source. What was measured is of each layer, or of a span that begins with "
        "it where layers go in one piece; low goes first."
    )
    shown = table(
        caption, ["layer", *columns, "what became of it"], rows, words=("what became of it",)
    )
    drawn = figure(plots.layer_measures(of, name), "What the choice of layers went by.")
    return join([element("h3", "Layers"), grid([drawn]), shown])


def _sites(report: Report) -> Html:
    if not report.sites:
        return Html("")
    columns: list[tuple[str, Callable[[SiteReport], str]]] = [
        ("layer", lambda s: str(s.layer)),
        ("kind", lambda s: s.kind),
        ("consumer", lambda s: s.name),
        ("units", lambda s: f"{s.units_before:,} → {s.units_after:,}"),
        ("columns", lambda s: f"{s.columns_before:,} → {s.columns_after:,}"),
        ("residual", lambda s: percent(s.relative_residual, 2)),
        ("ridge used", lambda s: number(s.ridge_used)),
        ("condition", lambda s: number(s.condition)),
        ("backward error", lambda s: number(s.backward_error, 2)),
        ("dead", lambda s: NONE if s.dead_columns is None else str(s.dead_columns)),
        ("precision", lambda s: s.precision or NONE),
        ("bias added", lambda s: "yes" if s.bias_added else "no"),
        ("seconds", lambda s: number(sum(s.seconds.values()))),
        ("for layers", lambda s: layers(s.across) or NONE),
        ("steps", lambda s: "; ".join(s.steps) or NONE),
    ]
    rows = [[show(site) for _, show in columns] for site in report.sites]
    explained = ", ".join(f"{kind}: {SITE_NAMES.get(kind, kind)}" for kind in _kinds(report.sites))
    shown = table(
        f"Every pruned structure, in the order of the forward pass ({explained}).",
        [label for label, _ in columns],
        rows,
        words=("kind", "consumer", "precision", "bias added", "steps"),
    )
    many = len(report.sites)
    return details(f"The numbers of all {many} Site{'s' * (many != 1)}", shown)


def _calibration(report: Report) -> Html:
    if not report.calibration:
        return Html("")
    return details(
        "Calibration",
        records("The tokens that the statistics come from.", _identified(report.calibration)),
    )


def _identified(calibration: dict[str, Any]) -> dict[str, Any]:
    """Without what recognises the text elsewhere."""
    return {name: value for name, value in calibration.items() if name != "sketch"}


def _latency(report: Report) -> Html:
    """Where a budget in seconds comes from; empty for another."""
    if not report.latency:
        return Html("")
    own = {n: v for n, v in report.latency.items() if n not in ("environment", "workload")}
    versions = {n: report.latency["environment"].get(n) for n in ("liar_ext", "torch", "threads")}
    shown = {"workload": workload(report.latency), **own, **versions}
    return details("Latency", records("What the predicted latency was measured with.", shown))


def _kinds(sites: Iterable[SiteReport]) -> list[str]:
    return list(dict.fromkeys(site.kind for site in sites))


def time_of(seconds: float | None, device: Any) -> tuple[str, str, str]:
    """The card of how long it took."""
    return ("Time it took", duration(seconds), f"on {device or 'an unknown device'}")

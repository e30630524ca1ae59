"""The top of the page: what it is about, its figures to be seen first, outputs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from liar_ext.report import pruned, quality, serving
from liar_ext.report.loading import auto_class
from liar_ext.report.material import Material
from liar_ext.report.outputs import PRUNED, Output
from liar_ext.report.page import Html, cards, element, join, listing, paragraph, table
from liar_ext.report.schema import CONVOLUTIONS, RECOVERED
from liar_ext.report.text import (
    NONE,
    budgeted,
    change,
    duration,
    latency,
    layers,
    parameters,
    percent,
    size,
)

# figures of quality that a header has room for
MOST_VERDICTS = 3


def title_of(outputs: Sequence[Output]) -> str:
    bases = list(dict.fromkeys(output.base for output in outputs))
    if len(outputs) > 1:
        return f"{', '.join(bases)}: {len(outputs)} outputs"
    (only,) = outputs
    word = {PRUNED: "pruned", RECOVERED: "trained a little", CONVOLUTIONS: "fused"}
    if only.kind in word:
        return f"{only.base}, {word[only.kind]}"
    of = only.data["layers"]
    return f"{only.base}, {of['before']} layers made {of['after']}"


def header(
    title: str, outputs: Sequence[Output], material: Material, rows: Sequence[quality.Row]
) -> Html:
    if len(outputs) > 1:
        lead = "What became of one model in several ways, side by side."
        if len({output.base for output in outputs}) > 1:
            lead = "Several models, and what became of them."
        return element("header", join([element("h1", title), paragraph(lead, class_="lead")]))
    (only,) = outputs
    done = only.done()
    figures = [
        *quality.verdict(rows, only)[:MOST_VERDICTS],
        *serving.verdict(material.serves, only),
        *_cards(only),
    ]
    lead = f"{done[:1].upper()}{done[1:]}."
    return element(
        "header", join([element("h1", title), paragraph(lead, class_="lead"), cards(figures)])
    )


def _cards(output: Output) -> list[tuple[str, str, str]]:
    totals, data = output.totals, output.data
    sizes = [
        ("Parameters", "parameters", parameters),
        ("Weight files", "bytes", size),
        ("Predicted latency of the targeted structures", "site_latency", latency),
    ]
    found = [
        (
            label,
            show(totals.get(f"{key}_after")),
            f"{show(totals.get(f'{key}_before'))} before, "
            f"{change(totals.get(f'{key}_before'), totals.get(f'{key}_after'))}",
        )
        for label, key, show in sizes
        if totals.get(f"{key}_after") is not None
    ]
    if of := data.get("layers"):
        gone = of.get("dropped")
        note = f"{of['before']} before"
        found.append(
            ("Layers", str(of["after"]), note + (f"; gone: {layers(gone)}" if gone else ""))
        )
    if output.report is not None and data["recipe"].get("sparsity", 1):
        asked = f"asked for {percent(totals.get('sparsity_asked'))} of {budgeted(data['recipe'])}"
        found.append(("Removed of what was targeted", percent(totals.get("sparsity")), asked))
    found.append(pruned.time_of(output.seconds, output.environment.get("device")))
    how = "stock loaders refuse it by its model_type"
    if output.stock:
        how = f"as {auto_class(data['config'])}" if data.get("config") else "as any other model"
    found.append(("Loads with", "transformers" if output.stock else "liar_ext.load", how))
    return found


def warnings(outputs: Sequence[Output]) -> Html:
    several = len(outputs) > 1
    found = [
        f"{output.label}: {warning}" if several else str(warning)
        for output in outputs
        for warning in output.data.get("warnings", ())
    ]
    if not found:
        return Html("")
    title = f"{len(found)} warning{'s' if len(found) > 1 else ''}"
    return element(
        "section",
        join([element("strong", title), listing(found)], ""),
        class_="alert",
        aria_label="Warnings",
    )


def side_by_side(outputs: Sequence[Output], rows: Sequence[quality.Row]) -> Html:
    metrics = list(dict.fromkeys((row.metric, row.dataset) for row in rows if row.output))
    head = ["output", "what was done", "parameters", "change", "files", "time", "loads with"]
    names = [f"{m}, {d}" if d and len({x for x, _ in metrics}) < len(metrics) else m
             for m, d in metrics]  # fmt: skip
    lines = []
    for output in outputs:
        totals = output.totals
        before, after = totals.get("parameters_before"), totals.get("parameters_after")
        values = [
            next(
                (
                    f"{r.value:.5g}"
                    for r in rows
                    if r.output is output and (r.metric, r.dataset) == m
                ),
                NONE,
            )
            for m in metrics
        ]
        lines.append(
            [
                output.label,
                output.done(),
                parameters(after),
                change(before, after),
                size(totals.get("bytes_after")),
                duration(output.seconds),
                "transformers" if output.stock else "liar_ext.load",
                *values,
            ]
        )
    bases = list(dict.fromkeys(output.base for output in outputs))
    caption = f"Made from {', '.join(bases)}."
    words = ("what was done", "loads with")
    return table(caption, [*head, *names], lines, words=words)

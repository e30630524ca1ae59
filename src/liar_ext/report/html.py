"""`liar report DIR`: one HTML file with everything inside, from `liar_report.json`."""

from __future__ import annotations

import math
import os
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError
from liar_ext.report import plots
from liar_ext.report.card import SITE_NAMES, auto_class
from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import (
    NONE,
    budgeted,
    change,
    duration,
    is_hub_id,
    latency,
    layers,
    number,
    parameters,
    percent,
    ridge,
    short_name,
    size,
    workload,
)

FILE = "report.html"
LOWER_IS_BETTER = ("perplexity", "loss", "kl")
# lists that identify samples are for machines; the page says how long they are
LONGEST_VALUE = 200


def write(
    report_folder: str | Path,
    out: str | Path | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Render the report of an output folder into a file, complete or not at all.

    Args:
        report_folder: a folder that `liar prune` has written.
        out: the file to write; None is `report.html` in the folder.
        evaluations: objects as `liar eval --json` prints them, see `render`.
    Returns:
        the file written.
    Raises:
        InputError: no report in the folder, a malformed evaluation, or `out` cannot be written.
    """
    page = render(Report.read(report_folder), evaluations)
    path = Path(report_folder) / FILE if out is None else Path(out)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        # mkstemp makes it private; the result gets what a plain open would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def render(report: Report, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page: inline styles and SVG, no script, nothing loaded from elsewhere.

    Args:
        evaluations: each with `source`, `metric`, a finite `value`, and optionally `dataset` and
            `standard_error` (of the value). The one whose source is the report's is the dense
            baseline.
    Raises:
        InputError: an evaluation lacks one of the three or its value is no finite number.
    """
    rows = [_evaluation(one, report) for one in evaluations]
    name = short_name(report.source)
    body = [
        _header(report, name),
        _warnings(report),
        _evaluations(rows),
        _plots(report),
        _layers(report),
        _sites(report),
        _records("Recipe", "What was asked for; the same as recipe.json.", report.recipe),
        _records("Calibration", "The tokens that the statistics come from.", report.calibration),
        _latency(report),
        _records("Environment", "Versions and device of the run.", report.environment),
    ]
    template = resources.files("liar_ext.report").joinpath("template.html").read_text("utf-8")
    return string.Template(template).substitute(
        title=escape(f"{name}: compression report"), body="\n".join(part for part in body if part)
    )


def _header(report: Report, name: str) -> str:
    totals, seconds = report.totals, report.seconds.get("total")
    stock = report.layout.startswith("stock")
    loads = "transformers" if stock else "liar_ext.load"
    how = auto_class(report.config) if stock else "stock loaders refuse it by its model_type"
    sizes = [
        ("Parameters", "parameters", parameters),
        ("Weight files", "bytes", size),
        ("Predicted latency of the targeted structures", "site_latency", latency),
    ]
    cards = [
        (
            label,
            show(totals.get(f"{key}_after")),
            f"{show(totals.get(f'{key}_before'))} before, "
            f"{change(totals.get(f'{key}_before'), totals.get(f'{key}_after'))}",
        )
        for label, key, show in sizes
        if totals.get(f"{key}_after") is not None
    ]
    if report.layers:
        gone = f"{report.layers['before']} before; left out: {layers(report.layers['dropped'])}"
        cards.append(("Layers", str(report.layers["after"]), gone))
    if report.recipe.get("sparsity", 1):
        asked = f"asked for {percent(totals.get('sparsity_asked'))} of {budgeted(report.recipe)}"
        cards.append(
            ("Sparsity of the targeted structures", percent(totals.get("sparsity")), asked)
        )
    cards += [
        ("Time", duration(seconds), f"on {report.environment.get('device', 'unknown device')}"),
        ("Loads with", loads, how),
    ]
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for label, value, note in cards
    )
    recipe = report.recipe
    widths = ("criterion", "allocation", "reconstruct") if recipe.get("sparsity", 1) else ()
    depth = ("depth", "span_repair") if report.layers else ()
    methods = ", ".join(
        f"{key.replace('_', ' ')} {recipe[key]}" for key in (*depth, *widths) if recipe[key]
    )
    origin = "" if is_hub_id(report.source) else f" · from {report.source}"
    return (
        f"<header><h1>{escape(name)}, pruned</h1>\n"
        f'<p class="soft">{escape(methods)}{escape(origin)}</p>\n'
        f'<dl class="totals">{items}</dl></header>'
    )


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    title = f"{len(report.warnings)} warning{'s' if len(report.warnings) > 1 else ''}"
    return (
        f'<section class="alert" aria-label="Warnings"><strong>{title}</strong>'
        f"<ul>{items}</ul></section>"
    )


def _plots(report: Report) -> str:
    figures = [
        (
            plots.widths(report),
            "Units of each layer: grey before, coloured after. A unit of the heads is one head, or "
            "one key/value head with the query heads that share it.",
        ),
        (
            plots.residual(report),
            "Mean squared error of the adjusted consumer's output over the variance of the dense "
            "one's, on the calibration tokens. 0 is a perfect repair; 100 % is a layer that "
            "outputs its mean.",
        ),
        (
            plots.time_split(report),
            "forward is the cost of running the calibration tokens through the model once (and "
            "once more each with an allocation that needs scores and for a dense target); gram and "
            "solve are the price of the repair.",
        ),
        (
            plots.solves(report),
            f"Ridge relative to the mean variance of the Site's columns; asked for "
            f"{ridge(report.recipe.get('ridge'))}. Condition of the scaled system with its ridge.",
        ),
    ]
    drawn = "\n".join(_figure(svg, caption) for svg, caption in figures if svg is not None)
    return f'<section><h2>What happened</h2><div class="plots">\n{drawn}\n</div></section>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _layers(report: Report) -> str:
    """What was measured of layers, where some were left out."""
    columns: dict[str, dict[int, float]] = {
        name: dict(enumerate(values)) for name, values in report.layers.get("measured", {}).items()
    }
    # of a method that takes one layer at a time
    steps = report.layers.get("steps", [])
    if steps:
        columns["loss once it had gone"] = {step["layer"]: step["loss"] for step in steps}
    if not columns:
        return ""
    went = {s["layer"]: f"left out ({at} of {len(steps)})" for at, s in enumerate(steps, 1)}
    dropped = {at: went.get(at, "left out") for at in report.layers["dropped"]}
    rows = [
        [
            str(at),
            *(number(found[at]) if at in found else NONE for found in columns.values()),
            dropped.get(at, "kept"),
        ]
        for at in range(report.layers["before"])
    ]
    return _table(
        "Layers",
        "Of the source. What was measured is of each layer, or of a span that begins with it where "
        "layers go in one piece; low goes first.",
        ["layer", *columns, "what became of it"],
        rows,
        text=("what became of it",),
    )


def _sites(report: Report) -> str:
    if not report.sites:
        return ""
    columns: list[tuple[str, Any]] = [
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
        ("steps", _steps),
    ]
    rows = [[show(site) for _, show in columns] for site in report.sites]
    explained = ", ".join(f"{kind}: {SITE_NAMES.get(kind, kind)}" for kind in _kinds(report.sites))
    return _table(
        "Sites",
        f"Every pruned structure, in the order of the forward pass ({explained}).",
        [label for label, _ in columns],
        rows,
        text=("kind", "consumer", "precision", "bias added", "steps"),
    )


def _kinds(sites: Iterable[SiteReport]) -> list[str]:
    return list(dict.fromkeys(site.kind for site in sites))


def _steps(site: SiteReport) -> str:
    return "; ".join(site.steps) or NONE


def _evaluations(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return (
            "<section><h2>Quality</h2><p>Not measured here: pass the output of "
            "<code>liar eval --json</code> for the dense and the pruned model to see both side by "
            "side. Residuals are diagnostics on calibration tokens, not quality.</p></section>"
        )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["metric"], row["dataset"]), []).append(row)
    table: list[list[str]] = []
    figures = []
    for index, ((metric, dataset), group) in enumerate(groups.items()):
        # the dense model first, the rest in the order given
        group.sort(key=lambda row: not row["dense"])
        base = group[0]["value"] if group[0]["dense"] else None
        for row in group:
            delta = NONE if base is None or row["dense"] else change(base, row["value"])
            error = NONE if row["error"] is None else f"± {number(row['error'])}"
            value = number(row["value"], 5)
            table.append([row["label"], metric, dataset or NONE, value, error, delta])
        better = "Lower" if metric.lower() in LOWER_IS_BETTER else "Higher"
        on = f" on {dataset}" if dataset else ""
        caption = f"{metric}{on}. {better} is better; the bars show one standard error."
        figures.append(_figure(plots.evaluation(group, metric, index), caption))
    shown = _table(
        "Quality",
        "As measured by liar eval; ± is one standard error.",
        ["model", "metric", "data", "value", "standard error", "change"],
        table,
        text=("model", "metric", "data"),
    )
    inside = shown.removesuffix("</section>")
    return f'{inside}<div class="plots">\n{"".join(figures)}\n</div></section>'


def _evaluation(one: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """One evaluation as a row: label, metric, dataset, value, error, dense."""
    if not isinstance(one, Mapping):
        raise InputError(f"evaluation {one!r}: must be an object as `liar eval --json` prints it")
    missing = [key for key in ("source", "metric", "value") if key not in one]
    if missing:
        raise InputError(
            f"evaluation {dict(one)!r:.100}: no {', '.join(missing)}; give what `liar eval --json` "
            "printed"
        )
    value, error = one["value"], one.get("standard_error")
    for name, given in (("value", value), ("standard_error", error)):
        optional = name == "standard_error" and given is None
        if not optional and not _finite(given):
            raise InputError(f"evaluation of {one['source']}: {name} {given!r} is no finite number")
    metric, source = str(one["metric"]), str(one["source"])
    dense = _same(source, report.source)
    label = f"{short_name(source)} (dense)" if dense else short_name(source)
    dataset = str(one.get("dataset") or "")
    return {
        "label": label,
        "metric": metric,
        "dataset": short_name(dataset) if dataset else "",
        "value": float(value),
        "error": error,
        "dense": dense,
    }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _latency(report: Report) -> str:
    """Where a budget in seconds comes from; empty for another."""
    if not report.latency:
        return ""
    own = {n: v for n, v in report.latency.items() if n not in ("environment", "workload")}
    versions = {n: report.latency["environment"].get(n) for n in ("liar_ext", "torch", "threads")}
    shown = {"workload": workload(report.latency), **own, **versions}
    return _records("Latency", "What the predicted latency was measured with.", shown)


def _records(title: str, caption: str, data: Mapping[str, Any]) -> str:
    rows = [[key, _value(value)] for key, value in data.items()]
    return _table(title, caption, ["field", "value"], rows, text=("value",))


def _value(value: Any) -> str:
    if value is None:
        return NONE
    shown = ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, list | tuple) and len(shown) > LONGEST_VALUE:
        return f"{len(value):,} entries, see liar_report.json"
    return shown


def _table(
    title: str, caption: str, head: list[str], rows: list[list[str]], text: tuple[str, ...]
) -> str:
    """A titled table, everything escaped; columns not in `text` are aligned as numbers."""
    classes = ["" if name in text or i == 0 else ' class="number"' for i, name in enumerate(head)]
    top = "".join(
        f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(head, classes, strict=True)
    )
    lines = []
    for row in rows:
        first, *rest = row
        cells = "".join(
            f"<td{c}>{escape(cell)}</td>" for cell, c in zip(rest, classes[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<section><h2>{escape(title)}</h2><div class="wide" role="region" tabindex="0" '
        f'aria-label="{escape(title)}"><table><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></section>"
    )


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--out {path}: cannot be written ({error.strerror}); give another file")

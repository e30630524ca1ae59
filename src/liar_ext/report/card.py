"""The model card of an output folder: what was done, how to load it, and what is not known."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from liar_ext.report.front_matter import OWN, TRANSFORMERS, front_matter
from liar_ext.report.loading import auto_class, base_model_type
from liar_ext.report.markdown import code, plain
from liar_ext.report.schema import Report, SiteReport
from liar_ext.report.text import (
    budgeted,
    change,
    count,
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

# what a layer lacks that has no unit of a kind
BLOCKS = {"heads": "attention", "ffn": "FFN"}
SITE_NAMES = {"ffn": "FFN neurons", "heads": "attention heads (KV groups where they are shared)"}
WARNINGS_SHOWN = 20


def model_card(report: Report, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The `README.md` of an output folder, with the hub's YAML front matter.

    Args:
        evaluations: objects as `liar eval --json` prints them; without any, the card says that
            the quality was not measured.
    """
    parts = [
        front_matter(
            {"config": report.config, "source": report.source},
            ("pruned", "structured-pruning"),
            TRANSFORMERS if report.layout.startswith("stock") else OWN,
        ),
        f"# {plain(short_name(report.source))}, pruned\n",
        _what(report),
        _sizes(report),
        _loading(report),
        _quality(report, evaluations),
        _calibration(report),
        _solves(report),
        _warnings(report),
        _repeat(report),
    ]
    return "\n".join(part for part in parts if part)


def residuals(sites: Sequence[SiteReport]) -> list[tuple[float, SiteReport]]:
    """The Sites whose residual is known, the worst last."""
    known = [(s.relative_residual, s) for s in sites if s.relative_residual is not None]
    return sorted(known, key=lambda pair: pair[0])


def _what(report: Report) -> str:
    what = [_layers(report), _widths(report)]
    device = plain(str(report.environment.get("device", "an unknown device")))
    return (
        f"Made from {code(short_name(report.source))} with liar-ext "
        f"{report.environment.get('liar_ext', '')}, without training. "
        f"{' '.join(part for part in what if part)}\n\n"
        f"{_options(report)}"
        f"{_workload(report)}"
        f"- made on {device}\n"
    )


def _layers(report: Report) -> str:
    """Of whole layers; empty where all are there."""
    if not report.layers:
        return ""
    before, dropped = report.layers["before"], report.layers["dropped"]
    across = [site for site in report.sites if site.across]
    repair = "nothing was repaired for them"
    if across:
        names = ", ".join(code(site.name) for site in across)
        repair = (
            f"least squares folded what they did, as far as it can be predicted, into {names} in "
            "front of them"
        )
    return (
        f"{len(dropped)} of its {before} layers were left out ({layers(dropped)}, counted from 0); "
        f"{repair}."
    )


def _widths(report: Report) -> str:
    """Of units of layers; empty where no width was to change."""
    if not report.recipe.get("sparsity", 1):
        return ""
    shrunk = [s for s in report.sites if s.units_after < s.units_before]
    kinds = " and ".join(SITE_NAMES[k] for k in dict.fromkeys(s.kind for s in shrunk))
    count_ = len({s.layer for s in shrunk})
    repair = {
        "none": "the linear layers that read them keep the rest of their weights as they were",
        "bias": "the linear layers that read them got a bias that stands in for their mean",
    }.get(
        report.recipe["reconstruct"],
        "the linear layers that read them were adjusted in closed form to make up for it",
    )
    return (
        f"In {count_} {'layer' if count_ == 1 else 'layers'}, {kinds or 'nothing'} were removed "
        f"physically; {repair}.{_gone(report)}"
    )


def _gone(report: Report) -> str:
    """Which layers have lost all of a kind."""
    found = {
        name: [site.layer for site in report.sites if site.kind == kind and not site.units_after]
        for kind, name in BLOCKS.items()
    }
    parts = [f"no {name} in {layers(own)}" for name, own in found.items() if own]
    return f" Nothing is left of some: {'; '.join(parts)} (layers, counted from 0)." * bool(parts)


def _options(report: Report) -> str:
    recipe, totals = report.recipe, report.totals
    lines = []
    if report.layers:
        chosen = recipe.get("depth")
        how = f"chosen by {code(chosen)}" if chosen else "as they were listed"
        lines.append(f"- layers {how}, repair {code(recipe['span_repair'])}")
    if recipe.get("sparsity", 1):
        lines += [
            f"- sparsity of the targeted structures, in {budgeted(recipe)}: "
            f"{percent(totals.get('sparsity'))} "
            f"(asked for {percent(totals.get('sparsity_asked'))})",
            f"- criterion {code(recipe['criterion'])}, allocation {code(recipe['allocation'])}, "
            f"reconstruction {code(recipe['reconstruct'])}, biases {code(recipe['bias'])}, "
            f"statistics {code(recipe['statistics'])}",
        ]
    return "".join(f"{line}\n" for line in lines)


def _workload(report: Report) -> str:
    """Of a budget in seconds; empty for another."""
    if not report.latency:
        return ""
    return f"- latency predicted from measurements: {plain(workload(report.latency))}\n"


def _sizes(report: Report) -> str:
    totals = report.totals
    rows: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("parameters", "parameters", parameters),
    ]
    if report.layers:
        rows.append(("layers", "layers", count))
        totals = totals | {f"layers_{when}": report.layers[when] for when in ("before", "after")}
    if totals.get("site_parameters_before", 1):
        rows.append(("of the targeted structures", "site_parameters", parameters))
    if totals.get("site_flops_after"):
        rows.append(("FLOPs per token of the targeted structures", "site_flops", count))
    if totals.get("site_latency_after") is not None:
        rows.append(("predicted latency of the targeted structures", "site_latency", latency))
    if totals.get("bytes_after") is not None:
        rows.append(("weight files", "bytes", size))
    lines = ["## Size\n", "| | before | after | change |", "|---|---:|---:|---:|"]
    for label, key, show in rows:
        before, after = totals.get(f"{key}_before"), totals.get(f"{key}_after")
        lines.append(f"| {label} | {show(before)} | {show(after)} | {change(before, after)} |")
    for kind in dict.fromkeys(s.kind for s in report.sites):
        sites = [s for s in report.sites if s.kind == kind]
        before_units, after_units = ([f(s) for s in sites] for f in (_before, _after))
        lines.append(
            f"| {SITE_NAMES[kind]} per layer | {_range(before_units)} | {_range(after_units)} | "
            f"{change(sum(before_units), sum(after_units))} |"
        )
    return "\n".join([*lines, ""])


def _loading(report: Report) -> str:
    if report.layout.startswith("stock"):
        auto = auto_class(report.config)
        text = f"Stock transformers loads this folder, without custom code{_alias(report)}."
        example = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")'
    else:
        text = (
            "The shapes of this model cannot be stated in a stock "
            f"{code(base_model_type(report.config))} config (widths that differ between layers, "
            "head counts or biases without a config field), so stock loaders refuse it by its "
            "`model_type`. The package liar-ext loads it as an ordinary transformers model."
        )
        example = 'import liar_ext\n\nmodel = liar_ext.load("PATH")'
    return f"## How to load\n\n{text}\n\n```python\n{example}\n```\n"


def _alias(report: Report) -> str:
    if report.layout == "stock":
        return ""
    return (
        f"; it is written as model type {code(report.config['model_type'])}, the same function "
        "with the same weight names, because the original config class rejects this head count"
    )


def _quality(report: Report, evaluations: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## Quality\n"]
    if evaluations:
        lines += ["| model | data | metric | value | standard error |", "|---|---|---|---:|---:|"]
        for one in evaluations:
            names = [code(short_name(str(one.get(key, "")))) for key in ("source", "dataset")]
            values = [number(one["value"], 5), number(one.get("standard_error"))]
            lines.append(f"| {' | '.join([*names, plain(str(one['metric'])), *values])} |")
        lines.append("")
    else:
        lines.append(
            "**Not measured.** Nothing on this card says how well the pruned model works. Compare "
            "it with the dense one on your own data before use (`liar eval`); abilities that the "
            "calibration text does not exercise can be lost unnoticed.\n"
        )
    known = residuals(report.sites)
    if known:
        found = [value for value, _ in known]
        lines.append(
            "Relative residual, the mean squared error of an adjusted layer's output over the "
            f"variance of the dense one's: median {percent(statistics.median(found))}, from "
            f"{percent(found[0])} ({code(known[0][1].name)}) to {percent(found[-1])} "
            f"({code(known[-1][1].name)}). It is measured on the calibration tokens themselves "
            "and layer by layer, so it is a diagnostic, not a quality.\n"
        )
    lines.append("The licence and the intended uses are those of the original model.\n")
    return "\n".join(lines)


def _calibration(report: Report) -> str:
    data = report.calibration
    if not data:
        return "## Calibration\n\nNo text was read.\n"
    source = short_name(str(data.get("source", "unknown")))
    lines = ["## Calibration\n", f"- source: {code(source)}"]
    amounts = [f"{int(data[key]):,} {key}" for key in ("samples", "tokens") if key in data]
    if data.get("seq_len"):
        amounts.append(f"at most {data['seq_len']:,} tokens each")
    if amounts:
        lines.append(f"- {', '.join(amounts)}")
    if data.get("sha256"):
        lines.append(f"- SHA-256 of the source: {code(str(data['sha256']))}")
    lines.append(f"- seed: {data.get('seed', report.recipe['seed'])}")
    return "\n".join([*lines, ""])


def _solves(report: Report) -> str:
    solved = [s for s in report.sites if s.ridge_used is not None]
    if not solved:
        return "## Least squares\n\nNo system was solved by this reconstruction.\n"
    used = [s.ridge_used for s in solved if s.ridge_used is not None]
    conditions = [s.condition for s in solved if s.condition is not None]
    dead = sum(s.dead_columns or 0 for s in solved)
    lines = [
        "## Least squares\n",
        f"- ridge, relative to the mean variance of a layer's columns: asked for "
        f"{ridge(report.recipe['ridge'])}, used {_spread(used)}",
    ]
    if conditions:
        lines.append(f"- condition of the scaled systems: {_spread(conditions)}")
    if dead:
        lines.append(f"- {dead} kept columns had no variance and take no part in the repair")
    stepped = [s for s in solved if s.steps]
    if not stepped:
        lines.append("- every system was solved as asked: no ridge raised, no solve repeated")
    shown = stepped[:WARNINGS_SHOWN]
    lines += [f"- {code(site.name)}: {plain('; '.join(site.steps))}" for site in shown]
    lines += _left_out(len(stepped))
    return "\n".join([*lines, ""])


def _warnings(report: Report) -> str:
    told = {f"{site.name}: {step}" for site in report.sites for step in site.steps}
    others = [warning for warning in report.warnings if warning not in told]
    if not others:
        return ""
    shown = [f"- {plain(warning)}" for warning in others[:WARNINGS_SHOWN]]
    return "\n".join(["## Warnings\n", *shown, *_left_out(len(others)), ""])


def _repeat(report: Report) -> str:
    from liar_ext.models.traced import KEY

    trace = " --trace" if KEY in report.config else ""
    skipped = ("device", "threads", "platform")
    versions = [
        f"{name} {value}"
        for name, value in report.environment.items()
        if value is not None and name not in skipped
    ]
    return (
        "## Repeat\n\n"
        "`recipe.json` holds every option and `liar_report.json` every number behind this card; "
        "`liar report DIR` draws them.\n\n"
        f"```sh\nliar prune SOURCE --out DIR --recipe recipe.json{trace}\n```\n\n"
        f"Versions: {code(', '.join(versions))}.\n"
    )


def _left_out(total: int) -> list[str]:
    rest = total - WARNINGS_SHOWN
    return [f"- and {rest} more in `liar_report.json`"] if rest > 0 else []


def _spread(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _before(site: SiteReport) -> int:
    return site.units_before


def _after(site: SiteReport) -> int:
    return site.units_after

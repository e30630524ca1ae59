"""Evaluations as tables: a row a model and metric, and what the figures are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# metrics as people read them; others as they are named
_LABELS = {
    "accuracy": "accuracy, %",
    "accuracy_norm": "accuracy by length, %",
    "accuracy_ppl": "accuracy by text loss, %",
    "spearman": "Spearman × 100",
    "pearson": "Pearson × 100",
    "matthews": "Matthews' correlation × 100",
    "f1": "F1 × 100",
    "exact_match": "exact match, %",
    "kl": "KL from dense, nats/token",
    "top1_agreement": "same top token, %",
}


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print evaluations, as `beside.Result.to_json` gives them."""
    from liar_ext.cli.output import console, print_table

    printer = console()
    print_table(table(results))
    for result in results:
        printer.print(facts(result), markup=False, soft_wrap=True)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The figures with their intervals, and with a dense model their differences."""
    from rich.markup import escape
    from rich.table import Table

    from liar_ext.report.text import short_dataset

    beside = any("difference" in result for result in results)
    found = Table(title=escape(results[0]["source"]), title_justify="left")
    for name in ("data", "metric", *(["model"] if beside else [])):
        found.add_column(name)
    for name in ("value", "95 % interval", *(["− dense", "± s. e."] if beside else [])):
        found.add_column(name, justify="right", no_wrap=True)
    for result in results:
        data = escape(short_dataset(result["dataset"]))
        dense = {**result.get("reference", {}), **result.get("dense", {}).get("estimates", {})}
        for metric, one in result["estimates"].items():
            label = escape(_LABELS.get(metric, metric))
            other = dense.get(metric)
            if other is not None:
                found.add_row(data, label, "dense", *_figures(other), "", "")
                data = label = ""
            row = [data, label]
            if beside:
                row.append("pruned")
            row += _figures(one)
            if beside:
                change = result["difference"].get(metric)
                row += ["", ""] if change is None else _change(change)
            found.add_row(*row)
            data = ""
        found.add_section()
    return found


def facts(result: dict[str, Any]) -> str:
    """One line on what the figures of a result are of."""
    from liar_ext.report.text import short_dataset

    parts = [short_dataset(result["dataset"]) + ":"]
    if "protocol" in result:
        protocol = result["protocol"]
        parts.append(
            f"{result['windows']} windows of {result['seq_len']} tokens "
            f"({protocol['seq_len_from']}), protocol {protocol['name']}"
        )
    elif "chance" in result:
        cut = f", {result['truncated']} of them cut to fit" if result["truncated"] else ""
        parts.append(
            f"chance {result['chance']:.4f}; {result['items']} {result['format']} items{cut}"
        )
    elif "tasks" in result:
        tasks = result["tasks"].items()
        asked = (f"{name} {one['samples']} at {one['num_fewshot']} shots" for name, one in tasks)
        parts.append(f"lm-eval {result['lm_eval']}, " + ", ".join(asked))
    elif "examples" in result:
        cut = f", {result['truncated']} of them cut to {result['seq_len']} tokens"
        parts.append(f"{result['examples']} examples{cut if result['truncated'] else ''}")
    elif "squad_version" in result:
        parts.append(
            f"{result['questions']} questions of version {result['squad_version']} in "
            f"{result['windows']} windows of {result['seq_len']} tokens at most, "
            f"{result['stride']} shared"
        )
    elif "pairs" in result:
        parts.append(f"{result['pairs']} pairs")
    method = result["interval_method"]
    if "difference" in result:
        change = result["difference"].get(result["metric"])
        method += "" if change is None else f"; differences {change['interval_method']}"
    return f"{' '.join(parts)}; {method}"


def stability_table(result: dict[str, Any]) -> Table:
    """Stability of one model against another."""
    from rich.table import Table

    sets = len(result["sets"])
    of = f"{result['items']} items" + (f", mean of {sets} sets" if sets > 1 else "")
    table = Table(title=f"{result['source']} against {result['dense']['source']}: {of}")
    table.title_justify = "left"
    for name in ("percent", "dense", "pruned"):
        table.add_column(name, justify="left" if name == "percent" else "right")
    for name, label in (
        ("accuracy_ppl", "accuracy by text loss"),
        ("accuracy", "accuracy"),
        ("accuracy_norm", "accuracy by length"),
    ):
        table.add_row(label, *(f"{result[who][name]:.2f}" for who in ("dense", "pruned")))
    table.add_section()
    table.add_row("both right or both wrong", "", f"{result['agreement']:.2f}")
    for label, weighted in (("loss", result), ("perplexity", result["by_perplexity"])):
        table.add_section()
        table.add_row(f"stability by spread of {label}", "", f"{weighted['stability']:.2f}")
        table.add_row("  first items (legacy)", "", f"{weighted['legacy']:.2f}")
        table.add_row("  effective items", "", f"{weighted['effective_sample_size']:.1f}")
    return table


def _figures(one: dict[str, Any]) -> list[str]:
    interval = one["confidence_interval"]
    shown = "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"
    return [_number(one["value"]), shown]


def _change(change: dict[str, Any]) -> list[str]:
    error = change["standard_error"]
    return [f"{change['value']:+.4g}", "" if error is None else f"{error:.2g}"]


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:.4g}"

"""A grid's JSON as a page of tables, and its plots (`grid_plots`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grid_plots

Row = dict[str, Any]
METRIC = {
    "minilm": "Spearman × 100 on STS-B dev (higher is better)",
    "demo": "perplexity on 128 held-out windows of 256 tokens (lower is better)",
}
RIDGE = 1e-4
# what a row is where nothing else is said
DEFAULT = {
    "allocation": "uniform",
    "reconstruct": "liar",
    "bias": "auto",
    "statistics": "sequential",
    "ridge": RIDGE,
    "target_signal": "local",
}


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these values, and the defaults for all else that has one; None is any value."""
    conditions = {**DEFAULT, **wanted}
    return [
        row
        for row in rows
        if all(row[name] == value for name, value in conditions.items() if value is not None)
    ]


def values(rows: Iterable[Row], name: str) -> list[Any]:
    """The distinct values of a field, in the order in which they appear."""
    return list(dict.fromkeys(row[name] for row in rows))


def heading(target: str) -> str:
    return target.replace("ffn", "FFN").replace(",", " + ")


def loss(data: dict[str, Any], row: Row) -> float:
    """What is less for a better row: nats, or points."""
    return row["loss"] if "loss" in row else -row["value"]


def better(data: dict[str, Any], row: Row, other: Row) -> float:
    """By how much `row` is better than `other`: per cent of perplexity, or points."""
    if "loss" in row:
        return 100 * (1 - row["value"] / other["value"])
    return row["value"] - other["value"]


def unit(data: dict[str, Any]) -> str:
    return "%" if "loss" in data["dense"] else "points"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    found = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*found, *("| " + " | ".join(line) + " |" for line in lines), ""]


def crossed(
    data: dict[str, Any], rows: list[Row], across: str, names: Sequence[Any], by: Sequence[str]
) -> list[str]:
    """A table with one column for each of `names`, the best of each line in bold."""
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in by) == key]
        found = {row[across]: row for row in own}
        best = min(own, key=lambda row: loss(data, row))
        shown = [
            "" if name not in found else _bold(found[name]["value"], found[name] is best)
            for name in names
        ]
        lines.append([*(_shown(by[i], part, own) for i, part in enumerate(key)), *shown])
    head = [{"target": "pruned", "sparsity": "removed"}.get(name, name) for name in by]
    return table([*head, *map(_name, names)], lines)


def _bold(value: float, best: bool) -> str:
    text = f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"
    return f"**{text}**" if best else text


def _shown(field: str, value: Any, rows: list[Row]) -> str:
    if field == "target":
        return heading(value)
    if field == "sparsity":
        reached = rows[0]["achieved"]
        return f"{value:.0%}" + (f" ({reached:.0%})" if abs(reached - value) > 0.01 else "")
    return str(value)


def _name(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def repairs(data: dict[str, Any]) -> list[str]:
    rows = select(data["rows"], reconstruct=None)
    crossed_with = {row["criterion"] for row in rows if row["reconstruct"] == "none"}
    rows = [row for row in rows if row["criterion"] in crossed_with]
    kept = {(r["target"], r["sparsity"]) for r in rows if r["reconstruct"] == "none"}
    rows = [row for row in rows if (row["target"], row["sparsity"]) in kept]
    names = values(rows, "reconstruct")
    if len(names) < 2:
        return []
    names = [*(name for name in names if name != "liar"), "liar"]
    compared, exceptions = 0, []
    for row in select(rows):
        for other in select(
            rows, **{n: row[n] for n in ("target", "sparsity", "criterion")} | {"reconstruct": None}
        ):
            # the same fit, by iteration
            if other["reconstruct"] in ("liar", "admm"):
                continue
            compared += 1
            if loss(data, row) > loss(data, other):
                exceptions.append((row, other))
    said = [
        f"`liar` is better in {compared - len(exceptions)} of {compared} comparisons with another "
        "reconstruction."
    ]
    for row, other in exceptions:
        said.append(
            f"- not at {heading(row['target'])} {row['sparsity']:.0%}, {row['criterion']}: "
            f"`{other['reconstruct']}` is {-better(data, row, other):.2f} {unit(data)} better"
        )
    gains = []
    for target, sparsity in dict.fromkeys((r["target"], r["sparsity"]) for r in rows):
        own = {
            (r["criterion"], r["reconstruct"]): r
            for r in rows
            if (r["target"], r["sparsity"]) == (target, sparsity)
        }
        found = [
            better(data, own[criterion, "liar"], row)
            for (criterion, name), row in own.items()
            if name == "none" and (criterion, "liar") in own
        ]
        gains.append([heading(target), f"{sparsity:.0%}", f"{min(found):.1f}", f"{max(found):.1f}"])
    return [
        "## Reconstructions, by criterion",
        "",
        *said,
        "",
        f"What `liar` gains over no repair, in {unit(data)}, from the criterion that gains least "
        "to the one that gains most:",
        "",
        *table(["pruned", "removed", "least", "most"], gains),
        *crossed(data, rows, "reconstruct", names, ("target", "sparsity", "criterion")),
    ]


def criteria(data: dict[str, Any]) -> list[str]:
    rows = select(data["rows"])
    names = values(rows, "criterion")
    best = []
    for target, sparsity in dict.fromkeys((r["target"], r["sparsity"]) for r in rows):
        own = [r for r in rows if (r["target"], r["sparsity"]) == (target, sparsity)]
        ranked = sorted(own, key=lambda row: loss(data, row))
        best.append(
            [
                heading(target),
                f"{sparsity:.0%}",
                ", ".join(f"{r['criterion']} {r['value']:.2f}" for r in ranked[:3]),
                f"{ranked[-1]['criterion']} {ranked[-1]['value']:.2f}",
            ]
        )
    return [
        "## Criteria, repaired by `liar`",
        "",
        f"![value against sparsity](grid-{data['model']}-criteria.svg)",
        "",
        *table(["pruned", "removed", "best three", "worst"], best),
        *crossed(data, rows, "criterion", names, ("target", "sparsity")),
    ]


def aimed(data: dict[str, Any]) -> list[Row]:
    """Rows of those cells that were run with several targets, by criterion."""
    rows = select(data["rows"], target_signal=None)
    by = ("target", "criterion", "sparsity")
    tried = {tuple(row[n] for n in by) for row in rows if row["target_signal"] != "local"}
    rows = [row for row in rows if tuple(row[n] for n in by) in tried]
    return sorted(rows, key=lambda row: (row["target"], row["criterion"], row["sparsity"]))


def aims(data: dict[str, Any]) -> list[str]:
    rows = aimed(data)
    names = values(rows, "target_signal")
    if len(names) < 2:
        return []
    return [
        "## What the repair aims at",
        "",
        f"![value against sparsity](grid-{data['model']}-targets.svg)",
        "",
        *crossed(data, rows, "target_signal", names, ("target", "criterion", "sparsity")),
    ]


def allocations(data: dict[str, Any]) -> list[str]:
    rows = select(data["rows"], allocation=None, target_signal=None)
    tried = {
        (r["criterion"], r["target_signal"], r["sparsity"], r["target"])
        for r in rows
        if r["allocation"] != "uniform"
    }
    by = ("criterion", "target_signal", "sparsity", "target")
    rows = [row for row in rows if tuple(row[name] for name in by) in tried]
    names = values(rows, "allocation")
    if len(names) < 2:
        return []
    return [
        "## Allocations",
        "",
        *crossed(
            data, rows, "allocation", names, ("target", "sparsity", "criterion", "target_signal")
        ),
    ]


def ridges(data: dict[str, Any]) -> list[str]:
    rows = select(data["rows"], ridge=None)
    swept = {row["criterion"] for row in rows if row["ridge"] != RIDGE}
    rows = [row for row in rows if row["criterion"] in swept]
    places = {(r["target"], r["sparsity"]) for r in rows if r["ridge"] != RIDGE}
    rows = [row for row in rows if (row["target"], row["sparsity"]) in places]
    if not rows:
        return []
    fixed = sorted({row["ridge"] for row in rows if row["ridge"] != "auto"})
    by = ("target", "sparsity", "criterion")
    worst, lines = [], []
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        own = {r["ridge"]: r for r in rows if tuple(r[name] for name in by) == key}
        if "auto" not in own:
            continue
        best = min((own[r] for r in fixed if r in own), key=lambda row: loss(data, row))
        behind = better(data, best, own["auto"])
        worst.append(behind)
        lines.append(
            [
                heading(key[0]),
                f"{key[1]:.0%}",
                key[2],
                f"{best['ridge']:g}",
                f"{best['value']:.2f}",
                f"{own['auto']['value']:.2f}",
                f"{behind:+.2f}",
            ]
        )
    said = []
    if worst:
        said = [
            f"`auto` against the best of the fixed ridges, in {unit(data)} (above 0: behind it); "
            f"at most {max(worst):.2f}.",
            "",
            *table(
                ["pruned", "removed", "criterion", "best ridge", "with it", "auto", "behind"], lines
            ),
        ]
    return ["## The ridge", "", *said, *crossed(data, rows, "ridge", [*fixed, "auto"], by)]


def others(data: dict[str, Any]) -> list[str]:
    """Options that are not axes: one-shot statistics, the other bias policy."""
    lines = []
    for row in data["rows"]:
        other = {n: row[n] for n in ("statistics", "bias") if row[n] != DEFAULT[n]}
        if not other:
            continue
        base = select(data["rows"], **{n: row[n] for n in ("target", "sparsity", "criterion")})
        if base:
            lines.append(
                [
                    heading(row["target"]),
                    f"{row['sparsity']:.0%}",
                    row["criterion"],
                    ", ".join(f"{name} {value}" for name, value in other.items()),
                    f"{row['value']:.2f}",
                    f"{base[0]['value']:.2f}",
                ]
            )
    if not lines:
        return []
    head = ["pruned", "removed", "criterion", "option", "value", "by default"]
    return ["## Other options", "", *table(head, lines)]


def markdown(data: dict[str, Any]) -> str:
    env, first = data["environment"], data["rows"][0]
    dense = data["dense"]
    error = f"{dense.get('loss_standard_error', dense['standard_error']):.2g}"
    error += " nats" if "loss" in dense else " points"
    lines = [
        f"# Grid: {data['model']}",
        "",
        f"{METRIC[data['model']]}; dense **{dense['value']:.2f}** (standard error "
        f"{error}). Made by `benchmarks/grid.py {data['model']}` with torch {env['torch']}, "
        f"transformers {env['transformers']}, on {env['device']}; {first['tokens']:,} calibration "
        f"tokens. Unless a table says otherwise: equal widths, `liar`, ridge {RIDGE:g}, sequential "
        "statistics, local targets. The best of a line is bold; what was reached is in brackets "
        "where units are too coarse for the sparsity. [What they say](README.md).",
        "",
    ]
    for part in (criteria, aims, repairs, allocations, ridges, others):
        lines += part(data)
    return "\n".join(lines).rstrip() + "\n"


def write(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"grid-{data['model']}.md").write_text(markdown(data), encoding="utf-8")
    rows = select(data["rows"])
    grid_plots.draw(data, rows, "criterion", folder / f"grid-{data['model']}-criteria.svg")
    if both := aimed(data):
        grid_plots.draw(data, both, "target_signal", folder / f"grid-{data['model']}-targets.svg")
    print(f"written: {folder}/grid-{data['model']}.md and its plots")

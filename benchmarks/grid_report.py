"""A grid's JSON as a Markdown table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# SVG ids are random otherwise, and every run would change the file
plt.rcParams["svg.hashsalt"] = "liar-ext"
COLOURS = {"none": "#b0b0b0", "bias": "#e0a030", "liar never": "#7fb0e0", "liar": "#1f5fbf"}
METRIC = {
    "minilm": ("STS-B dev, Spearman × 100 (higher is better)", "Spearman"),
    "demo": ("perplexity on 128 held-out windows of 256 (lower is better)", "perplexity"),
}


def label(row: dict[str, Any]) -> str:
    plain = row["reconstruct"] == "liar" and row["bias"] == "never"
    return "liar never" if plain else row["reconstruct"]


def heading(target: str, sparsity: float) -> str:
    return f"{target.replace('ffn', 'FFN').replace(',', ' + ')} {sparsity:.0%}"


def columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(label(row) for row in rows))


def main_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The criterion × reconstruction part: default ridge, uniform, sequential."""
    default = data["rows"][0]["ridge"]
    return [
        row
        for row in data["rows"]
        if row["ridge"] == default
        and row["allocation"] == "uniform"
        and row["statistics"] == "sequential"
        and not (data["model"] == "demo" and row["reconstruct"] == "liar" and row["bias"] == "auto")
    ]


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((row["target"], row["sparsity"]) for row in rows))


def find(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def markdown(data: dict[str, Any]) -> str:
    rows = main_rows(data)
    names = columns(rows)
    env = data["environment"]
    lines = [
        f"# Grid: {data['model']}",
        "",
        f"{METRIC[data['model']][0]}; dense **{data['dense']['value']:.2f}**. In brackets: mean "
        "relative residual of the Sites on the calibration tokens. Made by "
        f"`benchmarks/grid.py {data['model']}` with torch {env['torch']}, transformers "
        f"{env['transformers']}, on {env['device']}; {rows[0]['tokens']} calibration tokens, "
        f"ridge {rows[0]['ridge']:g}, sequential statistics, uniform widths.",
        "",
        f"![plot](grid-{data['model']}.svg)",
        "",
        "| removed | criterion | " + " | ".join(_shown(name) for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for target, sparsity in cells(rows):
        for criterion in dict.fromkeys(row["criterion"] for row in rows):
            group = find(rows, target=target, sparsity=sparsity, criterion=criterion)
            by_name = {label(row): row for row in group}
            shown = [
                f"{by_name[n]['value']:.2f} ({by_name[n]['residual']:.3f})" if n in by_name else ""
                for n in names
            ]
            reached = group[0]["achieved"]
            note = f" ({reached:.0%} reached)" if abs(reached - sparsity) > 0.01 else ""
            lines.append(
                f"| {heading(target, sparsity)}{note} | {criterion} | " + " | ".join(shown) + " |"
            )
    lines += ["", "## Other statistics and allocations (`liar`)", ""]
    lines += [
        "| removed | criterion | statistics | allocation | value | residual |",
        "|---|---|---|---|---|---|",
    ]
    default = data["rows"][0]["ridge"]
    for row in data["rows"]:
        if row["reconstruct"] != "liar" or row["ridge"] != default or row["bias"] != "auto":
            continue
        if row["criterion"] not in ("wanda", "flap"):
            continue
        where = heading(row["target"], row["sparsity"])
        lines.append(
            f"| {where} | {row['criterion']} | {row['statistics']} | {row['allocation']} | "
            f"{row['value']:.2f} | {row['residual']:.3f} |"
        )
    lines += ["", "## Ridge (`liar`, `wanda`, sequential, uniform)", ""]
    sweep = [
        row
        for row in data["rows"]
        if row["criterion"] == "wanda"
        and row["reconstruct"] == "liar"
        and row["bias"] == "auto"
        and row["allocation"] == "uniform"
        and row["statistics"] == "sequential"
    ]
    ridges = sorted({row["ridge"] for row in sweep})
    lines += [
        "| removed | " + " | ".join(f"{ridge:g}" for ridge in ridges) + " |",
        "|---|" + "---|" * len(ridges),
    ]
    for target, sparsity in cells(sweep):
        by_ridge = {r["ridge"]: r for r in find(sweep, target=target, sparsity=sparsity)}
        lines.append(
            f"| {heading(target, sparsity)} | "
            + " | ".join(f"{by_ridge[r]['value']:.3f}" if r in by_ridge else "" for r in ridges)
            + " |"
        )
    return "\n".join(lines) + "\n"


def plot(data: dict[str, Any], path: Path) -> None:
    rows = main_rows(data)
    names, wanted = columns(rows), cells(rows)
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    wide = 2 if len(wanted) <= 4 else 3
    high = -(-len(wanted) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4.2 * wide, 2.9 * high), squeeze=False)
    for axis, (target, sparsity) in zip(axes.flat, wanted, strict=False):
        values = []
        for offset, name in enumerate(names):
            for place, criterion in enumerate(criteria):
                group = find(rows, target=target, sparsity=sparsity, criterion=criterion)
                for row in group:
                    if label(row) == name:
                        values.append(row["value"])
                        axis.bar(
                            place + (offset - (len(names) - 1) / 2) * 0.2,
                            row["value"],
                            0.19,
                            color=COLOURS[name],
                            label=_shown(name) if place == 0 else None,
                        )
        dense = data["dense"]["value"]
        axis.axhline(dense, color="black", linewidth=0.8, linestyle="--")
        inside = [v for v in values if v < 4 * dense] or values
        low, top = min(*inside, dense), max(*inside, dense)
        margin = 0.08 * (top - low)
        axis.set_ylim(max(low - margin, 0), top + margin)
        axis.set_title(heading(target, sparsity), fontsize=10)
        axis.set_xticks(range(len(criteria)), criteria, fontsize=8)
        axis.set_ylabel(METRIC[data["model"]][1], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.suptitle(f"{METRIC[data['model']][0]}; dashed: dense", fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _shown(name: str) -> str:
    return {"liar never": "liar, no intercept"}.get(name, name)


def write(data: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"grid-{data['model']}.md").write_text(markdown(data), encoding="utf-8")
    plot(data, folder / f"grid-{data['model']}.svg")
    print(f"written: {folder}/grid-{data['model']}.md and .svg")

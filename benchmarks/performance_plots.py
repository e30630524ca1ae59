"""Plots of `docs/performance.md`: one SVG for each result, the same bytes for the same JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# SVG ids are random otherwise, and every run would change the file
plt.rcParams["svg.hashsalt"] = "liar-ext"
COLOURS = ("#b0b0b0", "#e0a030", "#7fb0e0", "#1f5fbf", "#70b070", "#905090", "#404040", "#c05050")


def plot_gram(data: dict[str, Any], path: Path) -> None:
    """Useful rate of each version, one panel for each dtype; dashed: the measured matmul rate."""
    # settings of one kernel would be most of the bars: they are in the table
    rows = [
        row
        for row in data["rows"]
        if row["case"] == "triangle" and "ms" in row and "setting" not in row
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(4.2 * len(dtypes), 3.2), squeeze=False)
    for axis, dtype in zip(axes.flat, dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        sizes = list(dict.fromkeys(row["n"] for row in own))
        for at, name in enumerate(names):
            for row in own:
                if row["variant"] == name:
                    place = sizes.index(row["n"]) + (at - (len(names) - 1) / 2) * 0.8 / len(names)
                    axis.bar(place, row["gflops"] / 1e3, 0.75 / len(names), color=_colour(at))
        ceiling = data["ceilings"]["matmul_gflops"][dtype] / 1e3
        axis.axhline(ceiling, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(dtype, fontsize=10)
        axis.set_xticks(range(len(sizes)), [f"n = {n}" for n in sizes], fontsize=8)
        axis.set_ylabel("useful TFLOP/s", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
    _finish(figure, names, f"Gram, {data['environment']['device']}; dashed: large product", path)


def plot_solve(data: dict[str, Any], path: Path) -> None:
    """Speed over the float64 baseline, each batch a group."""
    rows = [row for row in data["rows"] if row["kind"] == "time" and "ms" in row]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    shapes = list(dict.fromkeys((row["batch"], row["s"]) for row in rows))
    figure, axis = plt.subplots(figsize=(1.8 * len(shapes) + 2.6, 3.4))
    for row in rows:
        at, group = names.index(row["variant"]), shapes.index((row["batch"], row["s"]))
        place = group + (at - (len(names) - 1) / 2) * 0.8 / len(names)
        axis.bar(place, row["ratio"], 0.75 / len(names), color=_colour(at))
    axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(shapes)), [f"{b} × {s}²" for b, s in shapes], fontsize=8)
    axis.set_ylabel("× baseline", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    _finish(figure, names, f"Solve, {data['environment']['device']}", path)


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def _finish(figure: Any, names: list[str], title: str, path: Path) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=_colour(at)) for at in range(len(names))]
    wide = min(len(names), 3)
    lines = -(-len(names) // wide)
    figure.legend(handles, names, loc="lower center", ncols=wide, fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.03 + 0.05 * lines, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

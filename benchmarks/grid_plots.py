"""Plots of a grid: the value against sparsity, a panel for each target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# SVG ids are random otherwise, and every run would change the file
plt.rcParams["svg.hashsalt"] = "liar-ext"
COLOURS = {
    "obs": "#1f5fbf",
    "obs-swap": "#7fb0e0",
    "wanda": "#d06020",
    "flap": "#e0a030",
    "magnitude": "#808080",
    "random": "#c0c0c0",
    "rcpu": "#a05020",
    "leverage": "#309060",
    "snip": "#c04080",
    "michel": "#8040a0",
    "fisher": "#503090",
    "taylor-first": "#e080b0",
}
DASHES = {"local": "-", "dense": ":", "stream": "--"}
NAMES = {"ffn": "FFN", "heads": "heads", "ffn,heads": "FFN + heads"}


def draw(data: dict[str, Any], rows: list[dict[str, Any]], what: str, path: Path) -> None:
    """One line for each criterion, and with `what` target_signal for each target, too."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lower = "loss" in data["dense"]
    figure, axes = plt.subplots(1, len(targets), figsize=(3.9 * len(targets), 3.6), squeeze=False)
    for axis, target in zip(axes.flat, targets, strict=True):
        own = [row for row in rows if row["target"] == target]
        for criterion in dict.fromkeys(row["criterion"] for row in rows):
            for signal in dict.fromkeys(row["target_signal"] for row in rows):
                line = sorted(
                    (row["sparsity"], row["value"])
                    for row in own
                    if (row["criterion"], row["target_signal"]) == (criterion, signal)
                )
                if line:
                    label = criterion if what == "criterion" else f"{criterion}, {signal}"
                    axis.plot(
                        [100 * sparsity for sparsity, _ in line],
                        [value for _, value in line],
                        DASHES[signal],
                        color=COLOURS.get(criterion, "#000000"),
                        linewidth=1.8 if criterion in ("obs", "wanda") else 1.0,
                        marker="o",
                        markersize=2.5,
                        label=label,
                    )
        axis.axhline(data["dense"]["value"], color="black", linewidth=0.8, linestyle=":")
        if lower:
            axis.set_yscale("log")
            axis.set_ylim(top=min(axis.get_ylim()[1], 20 * data["dense"]["value"]))
        else:
            axis.set_ylim(bottom=max(axis.get_ylim()[0], 0))
        axis.set_title(NAMES[target], fontsize=10)
        axis.set_xlabel("removed, %", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.flat[0].set_ylabel("perplexity" if lower else "Spearman × 100", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle("dotted: dense", fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

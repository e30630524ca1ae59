"""The model card of a network with fewer convolutions."""

from __future__ import annotations

from typing import Any

from liar_ext.report.front_matter import OWN, front_matter
from liar_ext.report.markdown import plain
from liar_ext.report.schema import FILE
from liar_ext.report.text import short_name


def card(report: dict[str, Any]) -> str:
    """`README.md`, from what the report says."""
    network, latency, totals = report["network"], report["latency"], report["totals"]
    settings, images = report["settings"], report["images"]
    rows = "".join(
        f"| {segment['start']}-{segment['end']} | {_kept(segment)} | {segment['kernel']} | "
        f"{_residual(segment['repair'])} |\n"
        for segment in report["plan"]
    )
    return (
        front_matter(report, ("pruned", "layer-merging"), OWN)
        + f"\n# {plain(short_name(report['source']))} with {network['convolutions_after']} of "
        f"{network['convolutions_before']} convolutions\n\n"
        f"{network['activations_after']} of {network['activations_before']} activations stay; what "
        "lies between two of them is one convolution with the batch norms folded in (LayerMerge, "
        f"arXiv 2406.12837), {_repaired(settings['repair'])}.\n\n"
        f"{_quality(report)}\n\n"
        f"On {report['environment']['device']}, {settings['batch_size']} images of "
        f"{'x'.join(map(str, images['size']))} at a time, a forward takes "
        f"{latency['measured']:.3f} of the dense network's time (batch norms folded in there too; "
        f"{latency['asked']:g} was asked for, {latency['predicted']:.3f} predicted).\n\n"
        f"{totals['parameters_before']:,} parameters before, {totals['parameters_after']:,} after. "
        "Loads with `liar_ext.load`; stock loaders refuse it, for kernels of such sizes have no "
        "place in the family's config.\n\n"
        "| convolutions | kept | kernel | error, relative |\n|---|---|---:|---:|\n"
        f"{rows}\nMade by liar-ext {report['environment']['liar_ext']}; `{FILE}` has the rest.\n"
    )


def _kept(segment: dict[str, Any]) -> str:
    return ", ".join(map(str, segment["kept"])) or "none"


def _residual(repair: dict[str, Any] | None) -> str:
    return "" if repair is None else f"{repair['error_before']:.4f} -> {repair['error']:.4f}"


def _repaired(repair: str) -> str:
    if repair == "none":
        return "as merging gives it"
    return "refitted by least squares to what the dense network has in front of the same activation"


def _quality(report: dict[str, Any]) -> str:
    found, images = report["quality"], report["images"]
    steps = [("dense", "dense"), ("merged", "merged"), ("repaired", "repaired")]
    told = [f"{found[key]['accuracy']:.2%} {name}" for key, name in steps if found[key]]
    if report["training"]:
        told.append(
            f"{found['final']['accuracy']:.2%} after {report['training']['steps']} steps of "
            "training on the other images"
        )
    return (
        f"Right on {images['held_out']} held-out images, on which plans were compared: "
        f"{', '.join(told)}. Images that had no part in the choice were not looked at."
    )

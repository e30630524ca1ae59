"""`liar fuse SRC --out DIR`: a convolutional network with fewer convolutions."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.option_table import Options, add_options, given_of
from liar_ext.cli.options import refuse_torchrun

# of FuseSettings, but for the learning rate's name there
OPTIONS: Options = {
    "images": (
        str,
        "IMAGES",
        "a folder with a folder for each class, or an .npz or .safetensors with images (n, "
        "channels, h, w), as the network takes them, and labels (n,)",
    ),
    "time": (float, "F", "fraction of the dense network's time, batch norms folded in"),
    "top": (int, "N", "plans that are built and compared as whole networks"),
    "repair": (
        str,
        "NAME",
        "liar (merged convolutions refitted by least squares) or none",
    ),
    "importance": (
        str,
        "NAME",
        "what a segment is worth: loss, accuracy, or paper (exp of the change in accuracy)",
    ),
    "largest_kernel": (int, "N", "of merged convolutions"),
    "held_out": (
        float,
        "F",
        "fraction of the images to measure on, and to fit nothing to",
    ),
    "patches": (int, "N", "positions that a convolution is refitted to, at most"),
    "table_steps": (int, "N", "updates of each segment before it is measured"),
    "finetune_steps": (int, "N", "updates of the whole network at the end"),
    "lr": (float, "F", "learning rate of these"),
    "batch_size": (int, "N", "images at a time; also what is timed"),
    "repeats": (int, "N", "rounds of each latency"),
    "steps": (int, "N", "units that the budget is cut into; times are rounded up"),
    "seed": (int, "N", "of which images are held out, and the order of training"),
    "device": (str, "NAME", "auto, cpu, cuda"),
}
REQUIRED = ("images", "time")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fuse",
        help="merge convolutions of a ResNet or MobileNetV2",
        description="Choose which activations and convolutions stay (LayerMerge), under a latency "
        "that is measured here, and merge what lies between into single convolutions, refitted by "
        "least squares.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    options = {
        name: (kind, metavar, text if name in REQUIRED else f"{text} (default {_usual(name)})")
        for name, (kind, metavar, text) in OPTIONS.items()
    }
    add_options(parser, options, required=REQUIRED)
    parser.add_argument(
        "--tables",
        metavar="FILE",
        help="keep what was measured here, and start from it with another --time",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def _usual(name: str) -> Any:
    from liar_ext.convolution.settings import FuseSettings

    return getattr(FuseSettings, _field(name))


def _field(name: str) -> str:
    """Of FuseSettings."""
    return "learning_rate" if name == "lr" else name


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    refuse_torchrun("liar fuse is one process; run it without torchrun")
    from liar_ext.cli.output import Watcher
    from liar_ext.convolution import FuseSettings, fuse

    given = given_of(arguments, OPTIONS)
    settings = FuseSettings(**{_field(name): value for name, value in given.items()})
    with Watcher.of(arguments) as progress:
        report = fuse(
            arguments.source,
            arguments.out,
            settings,
            tables=arguments.tables,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    if not arguments.json:
        network, latency, quality = report["network"], report["latency"], report["quality"]
        print(
            f"convolutions: {network['convolutions_before']} -> {network['convolutions_after']}, "
            f"activations: {network['activations_before']} -> {network['activations_after']}"
        )
        print(
            f"time: {latency['measured']:.3f} of the dense network's (asked {latency['asked']:g}, "
            f"predicted {latency['predicted']:.3f})"
        )
        told = [f"{k} {v['accuracy']:.4f}" for k, v in quality.items() if v is not None]
        print(f"accuracy on held-out images: {', '.join(told)}")
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}

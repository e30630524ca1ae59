"""`liar replace SRC --out DIR`: a window of layers replaced by fewer, which are trained."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.option_table import Options, add_options, given_of
from liar_ext.cli.options import refuse_torchrun
from liar_ext.cli.training import TEXT, add_training, carried_out, trained_line, training_of
from liar_ext.errors import InputError

# of a Replacement. its defaults are said here again: to import it takes seconds, which help should
# not
OPTIONS: Options = {
    "depth": (
        str,
        "NAME",
        "with --drop, how the window is chosen: streamline (the highest cosine), angular (the "
        "smallest angle), reverse (the last layers); default streamline",
    ),
    "samples": (int, "N", "windows of the text that the choice looks at (default 50)"),
    "network": (
        str,
        "NAME",
        "what stands in: layer, layers (--count of them), or a layer without attention, which "
        "needs liar_ext.load: swiglu (of families with a gated FFN), mlp (of others) (default "
        "layer)",
    ),
    "count": (int, "N", "of --network layers (default 2)"),
    "init": (
        str,
        "HOW",
        "what stands in begins as the window's first layers (inherit) or by --seed (random) "
        "(default inherit)",
    ),
    "loss": (
        str,
        "NAME",
        "mse (hidden states behind the window in the whole model) or lm (next token through the "
        "shortened model) (default mse)",
    ),
    "loss_tokens": (
        str,
        "HOW",
        "of mse: plain, or normalised, each token's error over its target's mean square, so that "
        "the few tokens with huge states do not decide (default plain)",
    ),
    "keep": (str, "WHICH", "weights: best on held-out windows, or last (default best)"),
    "device": (str, "NAME", "auto, cpu, cuda (default auto)"),
}
DEFAULTS = {
    "steps": "required",
    "floor": "default 0.25",
    "accumulation": "default 16",
    "weight_decay": "default 1e-3",
    "clip": "default 5 with mse, 1 with lm",
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "replace",
        help="replace a window of layers by fewer, and train these",
        description="Make a checkpoint with fewer layers (LLM-Streamline): one layer, or a few, "
        "stand in for a window of them, and are trained alone.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--drop",
        type=int,
        metavar="N",
        help="so many layers fewer: the window has as many more as stand in for it",
    )
    where.add_argument(
        "--window", metavar="A-B", help="these layers are replaced, counted from 0 (20-28)"
    )
    add_options(parser, OPTIONS)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    group = parser.add_argument_group("training of what stands in")
    group.add_argument("--train", metavar="TEXT", help=f"{TEXT} (required)")
    add_training(group, DEFAULTS)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    refuse_torchrun("liar replace is one process; run it without torchrun")
    from liar_ext.depth.replace import replace_layers

    report = carried_out(replace_layers, arguments, replacement_of(arguments))
    if not arguments.json:
        print("\n".join(report_lines(report)))
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}


def replacement_of(arguments: argparse.Namespace) -> Any:
    """The Replacement that the options describe.

    Raises:
        InputError: an option that means nothing, alone or with another.
    """
    from liar_ext.depth.methods import parse_layers
    from liar_ext.depth.replace import Replacement
    from liar_ext.depth.replace.settings import SCHEDULES

    given = given_of(arguments, OPTIONS)
    if arguments.train is None:
        raise InputError("--train is missing: give the text that the new layers are trained on")
    if arguments.window is not None:
        for name in ("depth", "samples"):
            if name in given:
                raise InputError(f"--{name}: chooses a window, and --window gives one")
        layers = parse_layers(arguments.window, "--window")
        if layers != tuple(range(layers[0], layers[-1] + 1)):
            raise InputError(f"--window {arguments.window}: must be layers in a row, e.g. 20-28")
        given["window"] = layers[0], layers[-1]
    training = training_of(arguments, SCHEDULES.get(given.get("loss", "mse")))
    return Replacement(training, drop=arguments.drop, **given)


def report_lines(report: dict[str, Any]) -> list[str]:
    """What was done, for people."""
    from liar_ext.report.text import count, number, size

    layers, totals, training = report["layers"], report["totals"], report["training"]
    gone, trained = layers["replaced"], layers["trained"]
    many = len(trained) > 1
    stand = f"layers {trained[0]} to {trained[-1]}" if many else f"layer {trained[0]}"
    lines = [
        f"layers {gone[0]} to {gone[-1]} replaced by {stand}, trained: layers {layers['before']} "
        f"-> {layers['after']}, parameters {count(totals['parameters_before'])} -> "
        f"{count(totals['parameters_after'])}, {size(totals['bytes_before'])} -> "
        f"{size(totals['bytes_after'])}, {report['seconds']:.1f} s"
    ]
    if (line := trained_line(training)) is not None:
        nothing = training.get("nothing")
        beside = "" if nothing is None else f"; {number(nothing, 4)} with nothing in their place"
        lines.append(line + beside)
    return lines

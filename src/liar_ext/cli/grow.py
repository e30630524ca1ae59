"""`liar grow SRC --out DIR`: a checkpoint with more layers."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.options import refuse_torchrun
from liar_ext.cli.training import TEXT, add_training, carried_out, trained_line, training_of
from liar_ext.errors import InputError, unknown_choice


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "grow",
        help="insert layers, predicted from their neighbours",
        description="Make a deeper checkpoint (LESA): each new layer is predicted from the two "
        "beside it, and can be trained while the others are frozen.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--insert", metavar="LIST", help="behind these layers, counted from 0 (15-30, or 3,7)"
    )
    where.add_argument(
        "--layers", type=int, metavar="N", help="so many more, in the last N gaps between layers"
    )
    parser.add_argument(
        "--predictor",
        default="mlp",
        metavar="NAME",
        help="mlp (LESA), ridge, average (of the neighbours), copy (of the layer below), identity "
        "(a copy that adds nothing yet); default mlp",
    )
    parser.add_argument(
        "--hyper-parameters",
        metavar="NAME",
        help="of mlp: paper (5 epochs, norm weight 5e-5) or code (10 epochs, 5e-4); default paper",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="of mlp, instead of theirs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    group = parser.add_argument_group("training of the new layers")
    group.add_argument("--train", metavar="TEXT", help=TEXT)
    add_training(group)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    refuse_torchrun("liar grow is one process; run it without torchrun")
    from liar_ext.depth.grow import grow
    from liar_ext.report.text import count, size

    report = carried_out(grow, arguments, growth_of(arguments))
    if not arguments.json:
        layers, totals, training = report["layers"], report["totals"], report["training"]
        print(
            f"layers {layers['before']} -> {layers['after']}, parameters "
            f"{count(totals['parameters_before'])} -> {count(totals['parameters_after'])}, "
            f"{size(totals['bytes_before'])} -> {size(totals['bytes_after'])}, "
            f"{report['seconds']:.1f} s"
        )
        if training is not None and (line := trained_line(training)) is not None:
            print(line)
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report}


def growth_of(arguments: argparse.Namespace) -> Any:
    """The Growth that the options describe; the source's `config.json` says how many layers.

    Raises:
        InputError: an option that means nothing, alone or without another.
    """
    from dataclasses import replace

    from liar_ext.checkpoint.load import resolve
    from liar_ext.checkpoint.reader import read_config
    from liar_ext.depth.config import count_of
    from liar_ext.depth.grow import Growth
    from liar_ext.depth.grow.mlp import HYPER_PARAMETERS
    from liar_ext.depth.grow.placement import default_gaps
    from liar_ext.depth.methods import parse_layers
    from liar_ext.recipe import CHOICES

    if arguments.device not in CHOICES["device"]:
        raise unknown_choice("--device", arguments.device, CHOICES["device"])
    for name in ("hyper_parameters", "epochs"):
        if getattr(arguments, name) is not None and arguments.predictor != "mlp":
            raise InputError(
                f"--{name.replace('_', '-')}: is of --predictor mlp; {arguments.predictor} has none"
            )
    chosen = arguments.hyper_parameters or "paper"
    if chosen not in HYPER_PARAMETERS:
        raise unknown_choice("--hyper-parameters", chosen, HYPER_PARAMETERS)
    options = HYPER_PARAMETERS[chosen]
    if arguments.epochs is not None:
        options = replace(options, epochs=arguments.epochs)
    if arguments.insert is not None:
        gaps = parse_layers(arguments.insert, "--insert")
    else:
        data = read_config(resolve(arguments.source, config_only=True))
        gaps = default_gaps(count_of(data), arguments.layers)
    return Growth(
        gaps,
        predictor=arguments.predictor,
        options=options,
        seed=arguments.seed,
        training=training_of(arguments),
        device=arguments.device,
    )

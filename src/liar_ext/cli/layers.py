"""`liar layers SRC`: what is measured of layers, before any is left out."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.options import add_recipe_options, recipe_of, refuse_torchrun
from liar_ext.cli.prune import add_waiting, execution_of
from liar_ext.errors import InputError

# of the recipe, what says which text is read and how
READS = (
    *("calibration", "samples", "seq_len", "batch_size", "gradient_samples", "search_samples"),
    *("device", "dtype", "seed"),
)
DESCRIPTION = """Measure every layer of SRC, and spans of layers, by what the methods of `liar prune
--depth` go by. SRC is read layer by layer; nothing is written."""


def add_parser(commands: Any) -> None:
    from liar_ext.cli.options import OPTIONS

    parser = commands.add_parser(
        "layers", help="how much each layer does, by several measures", description=DESCRIPTION
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument(
        "--measures",
        metavar="NAME,NAME",
        default="influence,angle",
        help="influence, angle, magnitude-l1, magnitude-l2, taylor, loss (default influence,angle)",
    )
    parser.add_argument(
        "--spans",
        metavar="N,N",
        default="1",
        help="of influence and angle, lengths of spans; all are one pass (default 1)",
    )
    add_recipe_options(parser, without=[name for name in OPTIONS if name not in READS])
    add_waiting(parser.add_argument_group("execution"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, resume=False, journal_seconds=30.0, moments=None)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.cli.output import Watcher
    from liar_ext.depth.survey import layer_survey

    refuse_torchrun("liar layers is one process; run it without torchrun")
    measures = [name.strip() for name in arguments.measures.split(",") if name.strip()]
    spans = [part.strip() for part in arguments.spans.split(",")]
    if not all(part.isdecimal() for part in spans):
        raise InputError(f"--spans {arguments.spans}: must be whole numbers, e.g. 1,2,4")
    with Watcher.of(arguments) as watcher:
        found = layer_survey(
            arguments.source,
            recipe_of(arguments),
            measures,
            sorted({int(part) for part in spans}),
            execution=execution_of(arguments),
            progress=watcher,
        )
    if not arguments.json:
        print(f"{found['source']}: low can go; NAME/N is of N layers from this one on")
        print("\n".join(lines(found)))
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """A line for each layer; a span is where it begins, and the least of each column is marked."""
    columns = [["layer", *map(str, range(found["layers"]))]]
    for name, spans in found["measured"].items():
        for span, values in spans.items():
            least = min(values)
            shown = [f"{v:.4g}{'*' if v == least else ' '}" for v in values]
            shown += [""] * (found["layers"] - len(values))
            columns.append([name if span == "1" else f"{name}/{span}", *shown])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]

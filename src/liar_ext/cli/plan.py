"""`liar plan SRC`: what a compression would do and need, without doing it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from liar_ext.cli.options import add_recipe_options, planned_recipe
from liar_ext.cli.prune import add_places, add_trace
from liar_ext.errors import InputError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="shapes, memory, disk and time before anything runs",
        description="Estimate from shapes alone: reads the config and the weight files' headers.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that is to be made; its disk is looked at"
    )
    add_recipe_options(parser)
    group = parser.add_argument_group("execution")
    add_places(group)
    group.add_argument(
        "--ranks", type=int, metavar="N", default=1, help="what each of N processes needs"
    )
    group.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="plan for a GPU of this size that is not here, such as 80GiB",
    )
    add_trace(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.engine.execution import Execution

    execution = Execution(
        hidden_states=arguments.hidden_states,
        scratch=arguments.scratch,
        moments=arguments.moments,
    )
    memory = arguments.device_memory
    return show(
        arguments.source,
        planned_recipe(arguments),
        execution,
        as_json=arguments.json,
        out=arguments.out,
        ranks=arguments.ranks,
        trace=arguments.trace,
        device_memory=None if memory is None else bytes_of(memory),
    )


def bytes_of(text: str) -> int:
    """`80GiB` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip())
    if found is None or float(found[1]) <= 0:
        raise InputError(f"--device-memory {text}: must be a size such as 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


def show(
    source: str, recipe: Any, execution: Any = None, *, as_json: bool, **options: Any
) -> dict[str, Any]:
    """Print a plan unless it is to be JSON; `options` are those of `planning.plan`."""
    from liar_ext.cli.output import print_table
    from liar_ext.planning import plan
    from liar_ext.planning_table import render

    result = plan(source, recipe, execution=execution, **options)
    if not as_json:
        print_table(render(result))
    return result

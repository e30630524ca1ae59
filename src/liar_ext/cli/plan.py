"""`liar plan SRC`: what a compression would do and need, without doing it."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.cli.options import add_recipe_options, recipe_of


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="shapes, memory and time before anything runs",
        description="Estimate from shapes alone: reads the config and the weight files' headers.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    add_recipe_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return show(arguments.source, recipe_of(arguments), as_json=arguments.json)


def show(source: str, recipe: Any, execution: Any = None, *, as_json: bool) -> dict[str, Any]:
    from rich.console import Console

    from liar_ext.planning import plan, render

    result = plan(source, recipe)
    if not as_json:
        Console(highlight=False).print(render(result))
    return result

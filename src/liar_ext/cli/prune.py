"""`liar prune SRC --out DIR`: compress a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from liar_ext.cli.options import add_recipe_options, recipe_of


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="make a smaller checkpoint",
        description="Compress a local Hugging Face folder or hub id into a new folder.",
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; it is only read")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    add_recipe_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and stop")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    recipe = recipe_of(arguments)
    if arguments.dry_run:
        from liar_ext.checkpoint.load import resolve
        from liar_ext.checkpoint.writer import check_output
        from liar_ext.cli import plan

        source = resolve(arguments.source, config_only=True)
        check_output(Path(arguments.out), source, overwrite=arguments.overwrite)
        return plan.show(arguments.source, recipe, as_json=arguments.json)
    from liar_ext.cli.output import Watcher, print_table, summary
    from liar_ext.engine.api import compress

    with Watcher() as watcher:
        report = compress(
            arguments.source,
            arguments.out,
            recipe,
            overwrite=arguments.overwrite,
            progress=watcher,
        )
    if not arguments.json:
        print_table(summary(report))
        print(f"written: {arguments.out}")
    return {"out": arguments.out, **report.to_json()}

"""`liar env`: versions, devices, and which backends work here."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("env", help="versions, devices and usable backends")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from rich.markup import escape
    from rich.table import Table

    from liar_ext.cli.output import print_table
    from liar_ext.environment import environment
    from liar_ext.models import ADAPTERS
    from liar_ext.ops import backends

    # a setting that means nothing is an error here too
    for status in (described := backends.describe()):
        backends.forced(status.op)
    result = {
        **environment(),
        "backends": [asdict(status) for status in described],
        "models": sorted(ADAPTERS),
    }
    if not arguments.json:
        versions = Table(title="versions and device", title_justify="left", show_header=False)
        for name in environment():
            versions.add_row(name, str(result[name]))
        print_table(versions)
        table = Table(
            "op", "backend", "works here", "why not", title="backends", title_justify="left"
        )
        for row in result["backends"]:
            table.add_row(
                *(row["op"], row["backend"], "yes" if row["available"] else "no"),
                # what stands in brackets, as in 'liar-ext[triton]', is no markup
                escape(row["reason"] or ""),
            )
        print_table(table)
        print("models: " + ", ".join(result["models"]))
    return result

"""`liar demo`: the main job on the small LLaMA that ships with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the main job on a small LLaMA, offline, on a CPU",
        description="Prune the demo model with none, bias and liar; compare with the dense one.",
    )
    parser.add_argument("--out", metavar="DIR", help="keep the pruned models under this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.demo.run import demo

    out = None if arguments.out is None else Path(arguments.out)
    return demo(out, silent=arguments.json, progress=not arguments.quiet)

"""`liar report DIR`: one self-contained HTML page about a compression."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="HTML page with widths, residuals and times",
        description="Make a self-contained HTML page from a folder that `liar prune` wrote.",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--out", metavar="FILE", help="default: DIR/report.html")
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="FILE.json",
        help="what `liar eval --json` printed, dense or pruned; may be given several times",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from liar_ext.report.html import write

    evaluations = [one for path in arguments.evaluation for one in _evaluations(Path(path))]
    out = Path(arguments.out) if arguments.out else None
    print(f"written: {write(Path(arguments.folder), out, evaluations)}")


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """What one file holds: one evaluation or several, each with the dense model's where it has it.

    Raises:
        InputError: the file is not what `liar eval --json` prints.
    """
    try:
        # other lines may precede the object, as on the command's standard output
        data = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"--evaluation {path}: cannot be read as JSON ({error})") from error
    found: list[dict[str, Any]] = []
    several = data.get("evaluations", [data]) if isinstance(data, dict) else [data]
    for one in several if isinstance(several, list) else [several]:
        if not isinstance(one, dict) or not {"source", "metric", "value"} <= one.keys():
            raise InputError(f"--evaluation {path}: not what `liar eval --json` prints")
        beside = one.get("dense")
        found += [beside] if isinstance(beside, dict) and "value" in beside else []
        found.append(one)
    return found

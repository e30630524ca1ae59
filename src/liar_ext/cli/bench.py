"""`liar bench NAME`: measure, with a baseline in the same run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError, NumericalError


def add_parser(commands: Any, *, wanted: bool = True) -> None:
    """The `bench` command; its options only if it is `wanted`, for they import torch."""
    parser = commands.add_parser("bench", help="measure kernels and whole compressions")
    kinds = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    from liar_ext.bench import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        child = kinds.add_parser(name, help=benchmark.help, description=benchmark.help)
        if wanted:
            benchmark.add_arguments(child)
        child.add_argument(
            benchmark.file,
            metavar="FILE",
            dest="json_file",
            required=benchmark.file != "--json",
            help="write the result here, as JSON",
        )
        child.set_defaults(run=lambda arguments, b=benchmark: run(b, arguments))


def run(benchmark: Any, arguments: argparse.Namespace) -> None:
    """Measure, write, and only then complain.

    A wrong variant costs no other its figures.

    Raises:
        InputError: nowhere to write, or options that cannot be used.
        NumericalError: something that was measured is wrong or did not run.
    """
    file = arguments.json_file
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise InputError(f"{benchmark.file} {file}: {Path(file).parent} is not a folder")
    result = benchmark.execute(arguments)
    if file is not None:
        Path(file).write_text(
            json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        print(f"written: {file}")
    if problems := result.get("problems"):
        raise NumericalError("; ".join(problems))

"""`liar bench NAME`: measure, with a baseline in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from liar_ext.errors import NumericalError


def add_parser(commands: Any, *, wanted: bool = True) -> None:
    """The `bench` command; its options only if it is `wanted`, for they import torch."""
    parser = commands.add_parser("bench", help="how fast models answer, what methods take, kernels")
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

    A wrong variant costs no other its figures, and an interruption none of what a benchmark that
    keeps them had.

    Raises:
        InputError: nowhere to write, or options that cannot be used.
        NumericalError: something that was measured is wrong or did not run.
    """
    from liar_ext.bench.result import check_file, write_result

    option, file = benchmark.file, arguments.json_file
    if file is not None:
        check_file(option, file)
    kept = False

    def keep(result: Mapping[str, Any]) -> None:
        nonlocal kept
        if file is not None:
            write_result(option, file, result)
            kept = True

    try:
        result = benchmark.execute(arguments, keep)
    except KeyboardInterrupt as error:
        if not kept:
            raise
        raise KeyboardInterrupt(f"interrupted; {file} has what was measured") from error
    if file is not None:
        write_result(option, file, result)
        print(f"written: {file}")
    if problems := result.get("problems"):
        raise NumericalError("; ".join(problems))

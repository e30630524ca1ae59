"""Benchmarks behind `liar bench NAME`: one module each.

A module has `add_arguments(parser)` and `execute(arguments) -> dict`, which also prints. It checks
correctness before speed, measures its baseline in the same run, and reports medians with spread.
What is wrong or failed is named in `problems` of the result: the command writes the figures of the
others and then fails. One that measures for hours `keeps`: it is `execute(arguments, keep)`, and
gives `keep` the result as far as it has come.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# takes a result that is not complete yet
Keep = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Benchmark:
    """A module that is imported when it is used, and the line that `--help` prints about it.

    Attributes:
        file: the option that names where the result goes; another than `--json` has to be given.
        keeps: calls back with what it has measured so far.
    """

    module: str
    help: str
    file: str = "--json"
    keeps: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        importlib.import_module(self.module).add_arguments(parser)

    def execute(
        self, arguments: argparse.Namespace, keep: Keep = lambda result: None
    ) -> dict[str, Any]:
        execute = importlib.import_module(self.module).execute
        result: dict[str, Any] = execute(arguments, *([keep] if self.keeps else []))
        return result


BENCHMARKS = {
    "gram": Benchmark("liar_ext.bench.gram", "Gram accumulation beside x.T @ x"),
    "solve": Benchmark("liar_ext.bench.solve", "batched ridge solves beside torch.linalg"),
    "cosine": Benchmark("liar_ext.bench.cosine", "cosines of rows beside cosine_similarity"),
    "tune": Benchmark(
        "liar_ext.bench.tune", "launch parameters of the Triton kernels for this GPU"
    ),
    "latency": Benchmark(
        "liar_ext.bench.latency", "a layer at many widths, for --budget latency", file="--out"
    ),
    "serve": Benchmark(
        "liar_ext.bench.serve", "how fast models answer, dense and pruned by turns", keeps=True
    ),
    "align": Benchmark(
        "liar_ext.bench.align", "which multiples FFN widths should be, for --round-to", file="--out"
    ),
    "prune": Benchmark("liar_ext.bench.prune", "a whole compression beside one plain forward"),
    "methods": Benchmark(
        "liar_ext.bench.methods", "every method's compression beside one plain forward", keeps=True
    ),
}

"""Compression time against one plain forward over the same tokens, in the same run."""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.bench.measure import machine_state, source_name
from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.load import load, resolve
from liar_ext.cli.options import add_recipe_options, recipe_of
from liar_ext.engine.allocator import steady_allocator
from liar_ext.engine.api import prune
from liar_ext.engine.compress import compress
from liar_ext.engine.execution import Execution
from liar_ext.engine.inputs import compute_dtype, load_calibration, resolve_device
from liar_ext.engine.plain import plain_forward
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe
from liar_ext.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--name", help="what to call the model in the result; default its folder")
    parser.add_argument(
        "--streamed",
        action="store_true",
        help="from disk to disk as `liar prune` does, not in memory; reading and writing included",
    )
    parser.add_argument("--hidden-states", default="auto", metavar="PLACE", help="see liar prune")
    add_recipe_options(parser)


def execute(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print.

    The forward is that of the headless model (compression needs no head either), on the same
    batches, dtype and device, alternating with compressions: of fresh copies in memory, or with
    `--streamed` from disk to disk, after all forwards and without the dense model in memory: what
    `liar prune` asks of the allocator is for good.
    """
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: must be at least 1")
    recipe = recipe_of(arguments)
    folder = resolve(arguments.source)
    device = resolve_device(recipe.device)
    execution = Execution(hidden_states=arguments.hidden_states, journal_seconds=1e9)

    dense = load(folder, dtype=compute_dtype(recipe.dtype, device), device=device)
    batches = load_calibration(folder, dense, recipe).batches
    # the first pass pays for threads and libraries; a batch is enough for that
    plain_forward(dense, batches[:1], device)
    forward, compression = [], []
    reports: list[Report] = []
    for _ in range(arguments.repeats):
        forward.append(_timed(functools.partial(plain_forward, dense, batches, device), device))
        if not arguments.streamed:
            work = functools.partial(_prune_into, reports, copy.deepcopy(dense), batches, recipe)
            compression.append(_timed(work, device))
    del dense
    if arguments.streamed:
        steady_allocator()
        for _ in range(arguments.repeats):
            work = functools.partial(_compress_into, reports, folder, recipe, execution)
            compression.append(_timed(work, device))
    phases = [report.seconds for report in reports]
    ratios = [c / f for c, f in zip(compression, forward, strict=True)]
    tokens = sum(batch.tokens for batch in batches)
    result = {
        "benchmark": "prune",
        "device": device.type,
        "date": datetime.date.today().isoformat(),
        "source": arguments.name or source_name(arguments.source),
        "streamed": arguments.streamed,
        "layers": len({site.layer for site in reports[-1].sites}),
        "tokens": tokens,
        "repeats": arguments.repeats,
        "forward_seconds": _spread(forward),
        "compression_seconds": _spread(compression),
        "ratio": _spread(ratios),
        "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
        # names, not this machine's folders
        "recipe": recipe.to_json() | {"calibration": Path(str(recipe.calibration)).name},
        "environment": environment(device),
        "machine": machine_state(),
        # in memory, the dense model is there beside the copy being pruned
        "peak_bytes": reports[-1].run.get("peak_device_bytes"),
        "run": reports[-1].run,
        "residual": statistics.mean(site.relative_residual for site in reports[-1].sites),
    }
    print(
        f"{tokens} tokens: forward {result['forward_seconds']['median']:.2f} s, compression "
        f"{result['compression_seconds']['median']:.2f} s, ratio {result['ratio']['median']:.2f} "
        f"({result['ratio']['min']:.2f} to {result['ratio']['max']:.2f})"
    )
    print("  " + ", ".join(f"{k} {v:.2f} s" for k, v in result["phases"].items()))
    return result


def _prune_into(
    reports: list[Report], model: PreTrainedModel, batches: tuple[Batch, ...], recipe: Recipe
) -> None:
    reports.append(prune(model, batches, recipe))


def _compress_into(
    reports: list[Report], folder: Path, recipe: Recipe, execution: Execution
) -> None:
    with tempfile.TemporaryDirectory(prefix="liar-bench-") as temporary:
        reports.append(compress(folder, Path(temporary) / "out", recipe, execution=execution))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}

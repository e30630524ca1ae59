"""Time and memory of every method beside one plain forward of the same tokens, in the same run."""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.allocation import ALLOCATIONS
from liar_ext.bench import Keep
from liar_ext.bench.measure import machine_state, source_name
from liar_ext.calibration.batch import Batch
from liar_ext.checkpoint.load import load, resolve
from liar_ext.cli.options import add_recipe_options, recipe_of
from liar_ext.comparison.subject import reset_peak
from liar_ext.criteria import CRITERIA
from liar_ext.depth.methods import METHODS as DEPTH
from liar_ext.engine.allocator import steady_allocator
from liar_ext.engine.api import prune
from liar_ext.engine.compression import peak_host_bytes, resident_host_bytes
from liar_ext.engine.inputs import compute_dtype, load_calibration, resolve_device
from liar_ext.engine.plain import plain_forward
from liar_ext.environment import environment
from liar_ext.errors import InputError, LiarError, unknown_choice
from liar_ext.models.twin import twin
from liar_ext.recipe import CHOICES, Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report import Report

# the Recipe's fields that name methods, and their names: of widths, and of whole layers
WIDTHS: dict[str, Sequence[str]] = {
    "criterion": tuple(CRITERIA),
    "reconstruct": tuple(RECONSTRUCTIONS),
    "allocation": tuple(ALLOCATIONS),
    "target_signal": CHOICES["target_signal"],
}
LAYERS: dict[str, Sequence[str]] = {
    "depth": tuple(DEPTH),
    "span_repair": CHOICES["span_repair"],
    "target_signal": CHOICES["target_signal"],
    "refit": CHOICES["refit"],
}
METHODS = WIDTHS | LAYERS
# what takes longer is measured once
LONG_SECONDS = 60.0


@dataclass
class Row:
    """One method in place of the base recipe's; `method` is empty for the base itself.

    Attributes:
        problem: why there is nothing to measure; failed: that is a fault, not what it says itself.
    """

    method: str
    name: str
    recipe: Recipe
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    failed: bool = False

    @property
    def measured(self) -> bool:
        return self.problem is None and bool(self.seconds)

    @property
    def done(self) -> bool:
        """Whether another round says nothing new."""
        return self.problem is not None or (bool(self.seconds) and self.seconds[0] > LONG_SECONDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or hub id")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--vary",
        metavar="FIELDS",
        help=f"what is exchanged in the recipe, one at a time (default {','.join(WIDTHS)}; where "
        f"layers are left out {','.join(LAYERS)})",
    )
    parser.add_argument("--name", help="what to call the model in the result; default its folder")
    add_recipe_options(parser)


def rows_of(base: Recipe, fields: Sequence[str]) -> tuple[list[Row], list[dict[str, str]]]:
    """The base recipe, then each method in its place; and what no recipe can be, with reasons."""
    found, skipped = [Row("", "", base)], []
    for method in fields:
        for name in METHODS[method]:
            if name == getattr(base, method):
                continue
            try:
                change: dict[str, Any] = {method: name}
                found.append(Row(method, name, replace(base, **change)))
            except InputError as error:
                skipped.append({"method": method, "name": name, "reason": str(error)})
    return found, skipped


def execute(arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Measure and print; `keep` what there is after each method.

    In memory: each compression is of a twin that shares the dense tensors, so that `bytes` is what
    comes on top of the dense model, with the pruned layers.
    """
    recipe = recipe_of(arguments)
    own = LAYERS if recipe.shortens and not recipe.narrows else WIDTHS
    fields = list(own) if arguments.vary is None else arguments.vary.split(",")
    fields = [part.strip() for part in fields]
    if unknown := [name for name in fields if name not in METHODS]:
        raise unknown_choice("--vary", unknown[0], METHODS)
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: must be at least 1")
    # so that what one method frees is not what the next one is said not to need
    steady_allocator()
    folder, device = resolve(arguments.source), resolve_device(recipe.device)
    dense = load(folder, dtype=compute_dtype(recipe.dtype, device), device=device)
    batches = load_calibration(folder, dense, recipe).batches
    rows, skipped = rows_of(recipe, fields)
    # the first pass pays for threads and libraries; a batch is enough for that
    plain_forward(dense, batches[:1], device)
    if device.type == "cuda":
        # and the first compression for kernels: 1.4 s on an H200, 30 forwards of the demo model
        prune(twin(dense), batches, recipe)
    forward: list[float] = []
    versions = environment(device)

    def found() -> dict[str, Any]:
        base = statistics.median(forward)
        return {
            "benchmark": "methods",
            "device": device.type,
            "date": datetime.date.today().isoformat(),
            "source": arguments.name or source_name(arguments.source),
            "tokens": sum(batch.tokens for batch in batches),
            "repeats": arguments.repeats,
            "forward_seconds": _spread(forward),
            "rows": [_row(row, base) for row in rows if row.measured],
            "skipped": skipped
            + [
                {
                    "method": row.method,
                    "name": row.name,
                    "reason": row.problem or "not measured yet",
                }
                for row in rows
                if not row.measured
            ],
            # names, not this machine's folders
            "recipe": recipe.to_json() | {"calibration": Path(str(recipe.calibration)).name},
            "environment": versions,
            "machine": machine_state(),
            "problems": [f"{r.method} {r.name}: {r.problem}" for r in rows if r.failed],
        }

    for _ in range(arguments.repeats):
        start = time.perf_counter()
        plain_forward(dense, batches, device)
        forward.append(time.perf_counter() - start)
        for row in rows:
            if not row.done:
                _measure(row, dense, batches, device)
                keep(found())
    result = found()
    _show(result)
    return result


def _measure(
    row: Row, dense: PreTrainedModel, batches: Sequence[Batch], device: torch.device
) -> None:
    model = twin(dense)
    reset_peak()
    before = _in_use(device)
    start = time.perf_counter()
    try:
        report: Report = prune(model, batches, row.recipe)
    except Exception as error:
        if not row.method:
            raise
        # such as a criterion that needs a loss, of a model without one
        row.failed = not isinstance(error, LiarError)
        named = f"{type(error).__name__}: {error}" if row.failed else str(error)
        if row.failed:
            traceback.print_exc()
        row.problem = " ".join(named.split())
        return
    row.seconds.append(time.perf_counter() - start)
    row.bytes = max(row.bytes, _peak(device) - before)
    row.phases = dict(report.seconds)


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_host_bytes()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_bytes()


def _row(row: Row, forward: float) -> dict[str, Any]:
    return {
        "method": row.method,
        "name": row.name,
        "seconds": _spread(row.seconds),
        "forwards": statistics.median(row.seconds) / forward,
        "repeats": len(row.seconds),
        "bytes": row.bytes,
        "phases": row.phases,
    }


def _show(result: dict[str, Any]) -> None:
    forward = result["forward_seconds"]["median"]
    print(f"{result['tokens']} tokens, one plain forward {forward:.2f} s")
    for row in result["rows"]:
        name = f"{row['method']} {row['name']}".strip() or "the recipe as it is"
        print(f"  {name}: {row['forwards']:.2f} forwards, {row['bytes'] / 1e6:.0f} MB")
    for row in result["skipped"]:
        print(f"  {row['method']} {row['name']}: skipped ({row['reason']})")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}

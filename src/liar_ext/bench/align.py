"""`liar bench align`: of which number FFN widths should be multiples on this device.

The products of an FFN (producers, hidden size to width; consumer, width to hidden size) are timed
at widths around one that a pruned model would have: for each power of two some widths that are
multiples of it and of no larger one. What a width takes is compared with the straight line
through the widths that are multiples of the largest powers: the *excess*, 1.0 for none. The granule
is the least power of two from which on no multiples take more than the line allows, in both phases.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional

from liar_ext.alignment import VERSION
from liar_ext.bench.backends_of import DTYPES
from liar_ext.bench.measure import interleave, machine_state, quantiles, resolve_device
from liar_ext.bench.result import head
from liar_ext.cli.output import print_table
from liar_ext.errors import InputError, OutOfMemory, is_out_of_memory
from liar_ext.latency import disturbances

SPREAD = ("p20", "p50", "p80")
# powers of two that widths are multiples of; the two largest make the line
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BASE = 2
# more than this over the line is a width that the device does not like
TOLERANCE = 1.05
# widths of each power, all within this many of the widest step around the width in the middle
EACH, REACH = 4, 4


# hidden size and width: some 36 FFNs of that size are in memory, 0.9 GB in float32 and 6.8 in
# bfloat16; a third of LLaMA-7B's neurons are gone there
DEFAULTS = {"cpu": (1024, 2048), "cuda": (4096, 7680)}


@dataclass(frozen=True)
class Shape:
    """An FFN's products.

    Attributes:
        hidden: of the model; width: in the middle of those that are timed.
        producers: linears into it, two where it is gated.
    """

    hidden: int
    width: int
    producers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench align`."""
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]
    shown = f"(default {cpu[0]}, on a GPU {cuda[0]})"
    parser.add_argument("--hidden", type=int, metavar="N", help=f"hidden size {shown}")
    shown = f"(default {cpu[1]}, on a GPU {cuda[1]})"
    parser.add_argument("--width", type=int, metavar="N", help=f"FFN width to look around {shown}")
    parser.add_argument(
        "--producers", type=int, choices=(1, 2), default=2, help="2: a gated FFN (default)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="of a prefill (default 512)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences that decode (default 1)"
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="default 15")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default float32, bfloat16 on a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--note", default="", help="a remark kept in the result")


def execute(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print.

    Raises:
        InputError: a device that is not there, or a size that makes no sense.
        OutOfMemory: with the options to lower.
    """
    for name in ("hidden", "width", "tokens", "batch", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    device = resolve_device(arguments.device)
    dtype = arguments.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type]
    hidden, width = DEFAULTS[device.type]
    hidden, width = arguments.hidden or hidden, arguments.width or width
    shape = Shape(hidden, width, arguments.producers)
    chosen, before = widths(shape.width), machine_state()
    phases = {"decode": arguments.batch, "prefill": arguments.tokens}
    tables: list[dict[str, Any]] = [
        {
            "phase": phase,
            "tokens": tokens,
            **judge(_measured(shape, chosen, tokens, DTYPES[dtype], device, arguments.repeats)),
        }
        for phase, tokens in phases.items()
    ]
    result = {
        **head("align", device, before, arguments.note),
        "version": VERSION,
        "dtype": dtype,
        "hidden": shape.hidden,
        "width": shape.width,
        "producers": shape.producers,
        "repeats": arguments.repeats,
        "tolerance": TOLERANCE,
        "tables": tables,
        "granule": max(own["granule"] for own in tables),
        "doubts": disturbances([row for own in tables for row in own["classes"]]),
    }
    for text in result["doubts"]:
        print(f"warning: {text}", file=sys.stderr)
    print_table(shown(result))
    print(f"FFN widths: multiples of {result['granule']}; `--round-to FILE` takes it from the file")
    return result


def _measured(*words: Any) -> dict[int, dict[int, list[float]]]:
    try:
        return measure(*words)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "out of memory with an FFN of each width; lower --hidden or --width"
        ) from error


def powers(width: int) -> tuple[int, ...]:
    """Those whose multiples there are enough of around a width."""
    found = tuple(power for power in POWERS if power * 2 * REACH <= width)
    if len(found) <= BASE:
        least = next(p for p in POWERS[BASE:]) * 2 * REACH
        raise InputError(f"--width {width}: must be at least {least}, to have widths around it")
    return found


def widths(width: int) -> dict[int, list[int]]:
    """Power of two -> widths that are multiples of it and, but for the largest, of no larger one;
    all as far from `width` on both sides, so that none has the smaller ones.

    Raises:
        InputError: the width is too small.
    """
    known = powers(width)
    reach = known[-1] * REACH // 2
    found: dict[int, list[int]] = {}
    generator = random.Random(0)
    for power in known:
        last = power == known[-1]
        own = [
            n
            for n in range(width - reach - width % power, width + reach + 1, power)
            if n >= width - reach and (last or n // power % 2)
        ]
        low, high = [n for n in own if n <= width], [n for n in own if n > width]
        half = EACH // 2
        picked = [generator.sample(side, min(half, len(side))) for side in (low, high)]
        found[power] = sorted(n for side in picked for n in side)
    return found


def measure(
    shape: Shape,
    chosen: dict[int, list[int]],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[int, dict[int, list[float]]]:
    """Power -> width -> seconds of the products, all widths by turns."""
    x = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    calls = {}
    for power, own in chosen.items():
        for width in own:
            calls[f"{power} {width}"] = _products(shape, width, x)
    with torch.no_grad():
        seconds = interleave(calls, repeats, device)
    found: dict[int, dict[int, list[float]]] = {}
    for name, times in seconds.items():
        power, width = map(int, name.split())
        found.setdefault(power, {})[width] = times
    return found


def _products(shape: Shape, width: int, x: torch.Tensor) -> Any:
    def weight(out: int, into: int) -> torch.Tensor:
        return (torch.randn(out, into, device=x.device) * into**-0.5).to(x.dtype)

    producers = [weight(width, shape.hidden) for _ in range(shape.producers)]
    consumer = weight(shape.hidden, width)

    def run() -> torch.Tensor:
        made = [functional.linear(x, own) for own in producers]
        return functional.linear(made[0], consumer)

    return run


def judge(seconds: Mapping[int, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    """The excess of each power's multiples, and the granule.

    A width's time is the 20th percentile of its samples, for what else runs only adds to it. Not
    aligned well are the multiples of a power of which even the fastest width takes more than
    `TOLERANCE`: an effect of alignment slows all of them.

    Args:
        seconds: power -> width -> samples.
    """
    known = {p: {w: quantiles(own) for w, own in of.items()} for p, of in sorted(seconds.items())}
    best = [(w, own["p20"]) for power in list(known)[-BASE:] for w, own in known[power].items()]
    slope, start = _line(best)
    rows: list[dict[str, Any]] = []
    for power, of in known.items():
        excess = sorted(own["p20"] / (start + slope * width) for width, own in of.items())
        rows.append(
            {
                "multiple": power,
                "widths": list(of),
                "seconds": {name: [own[name] for own in of.values()] for name in SPREAD},
                "excess": {"least": excess[0], "median": median(excess), "most": excess[-1]},
            }
        )
    granule = rows[-BASE]["multiple"]
    for row in reversed(rows[:-BASE]):
        if row["excess"]["least"] > TOLERANCE:
            break
        granule = row["multiple"]
    return {"classes": rows, "granule": granule}


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Theil and Sen's: the median of the slopes between two points, one outlier notwithstanding."""
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0])
        for i, a in enumerate(points)
        for b in points[i + 1 :]
        if a[0] != b[0]
    ]
    slope = median(slopes) if slopes else 0.0
    return slope, median(seconds - slope * width for width, seconds in points)


def shown(result: dict[str, Any]) -> Table:
    """Excess by power of two, a column for each phase."""
    title = (
        f"{result['environment']['device']}, {result['dtype']}, hidden {result['hidden']}, widths "
        f"around {result['width']}: time over that of well-aligned widths"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("multiples of", justify="right")
    for own in result["tables"]:
        table.add_column(f"{own['phase']} of {own['tokens']}", justify="right")
    for rows in zip(*(own["classes"] for own in result["tables"]), strict=True):
        table.add_row(str(rows[0]["multiple"]), *(_cell(row["excess"]) for row in rows))
    return table


def _cell(excess: dict[str, float]) -> str:
    return f"{excess['median']:.3f} ({excess['least']:.3f}-{excess['most']:.3f})"

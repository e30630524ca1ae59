"""`liar bench tune`: time every candidate configuration of the Triton Gram kernels on this GPU."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from liar_ext.bench.backends_of import DTYPES
from liar_ext.bench.measure import machine_state
from liar_ext.bench.result import check_file, head
from liar_ext.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench tune`."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 11008, 28672], metavar="N")
    parser.add_argument("--tokens", type=int, default=16384, metavar="T")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="configurations as the kernels read them; default: only timed and printed",
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print. A candidate with a wrong result is not timed.

    Raises:
        InputError: no GPU, no triton, a size that makes no sense, or nowhere to write.
    """
    if args.out is not None:
        check_file("--out", args.out)
    if not torch.cuda.is_available():
        raise InputError("liar bench tune times kernels on a GPU, and torch sees no CUDA device")
    if find_spec("triton") is None:
        raise InputError("liar bench tune needs triton: pip install 'liar-ext[triton]'")
    if min([args.tokens, *args.sizes]) < 1:
        raise InputError(f"sizes and tokens must be positive: {args.sizes}, {args.tokens}")
    from liar_ext.kernels import tune

    device = torch.device("cuda")
    before = machine_state()
    out = None if args.out is None else Path(args.out)
    found = tune.tune(args.sizes, args.tokens, [DTYPES[name] for name in args.dtypes], out)
    # JSON has no infinity, which is the error of a candidate that gave NaN
    rows = [row | {"error": _finite(row["error"])} for row in found]
    print(table(rows))
    if out is not None:
        print(f"written: {out}; the kernels read it as {tune.device_file(device).name} beside the")
        print("other configurations")
    groups: dict[tuple[Any, ...], bool] = {}
    for row in rows:
        key = (row["kernel"], row["dtype"], row["columns"])
        groups[key] = groups.get(key, False) or row["best"]
    return {
        **head("tune", device, before),
        "rows": rows,
        "problems": [
            f"no right candidate for {kernel} {dtype} n={columns}"
            for (kernel, dtype, columns), best in groups.items()
            if not best
        ],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each candidate, the best of a group marked."""
    lines = []
    for row in rows:
        config = " ".join(f"{k} {v}" for k, v in row["config"].items() if v is not None)
        ms = "" if row["ms"] is None else f"{row['ms']:.4g} ms"
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        parts = (ms, "best" if row["best"] else "", error, row["reason"] or "")
        lines.append(
            f"{row['columns']:>6} {row['dtype']:9} {row['kernel']:10} {config}: "
            + " ".join(part for part in parts if part)
        )
    return "\n".join(lines)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value

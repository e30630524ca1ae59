"""`liar bench gram`: Gram accumulation beside `x.T @ x` of the same dtype, in the same run."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liar_ext.bench.measure import interleave, machine_state, spread
from liar_ext.environment import environment
from liar_ext.errors import InputError, NumericalError
from liar_ext.ops import Moments, _extension, backends, gram

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "x.T @ x"
# columns of the square that is compared with float64: the whole would take longer than the rest
CHECKED = 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench gram`."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 11008], metavar="N")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--backends", nargs="+", choices=backends.NAMES, help="default: all that run here"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--note", default="", help="a remark kept in the result")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print.

    Raises:
        InputError: a device or a backend that is not there, or a size that makes no sense.
        NumericalError: a variant is outside its error bound.
    """
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    device = torch.device(name)
    before = machine_state()
    rows = run(args.sizes, args.tokens, args.dtypes, args.backends, args.repeats, device)
    result = {
        "benchmark": "gram",
        "date": datetime.date.today().isoformat(),
        "environment": environment(device),
        "extension": _paths() if device.type == "cpu" else None,
        "machine": {"before": before, "after": machine_state()},
        "note": args.note,
        "rows": rows,
    }
    print(_table(rows))
    if wrong := [row["variant"] for row in rows if not row["ok"]]:
        raise NumericalError(f"gram is wrong on {', '.join(wrong)}: nothing else here counts")
    return result


def run(
    sizes: Sequence[int],
    tokens: int,
    dtypes: Sequence[str],
    names: Sequence[str] | None = None,
    repeats: int = 7,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """One row for each size, dtype and variant.

    Args:
        sizes: columns n. tokens: rows T. dtypes: keys of `DTYPES`.
        names: backends, or None for those that run on `device` by themselves.
        repeats: timed rounds; each round runs every variant once.
    Returns:
        rows with `ms` (median), `p20_ms`, `p80_ms`, `gflops` (useful: n²T, so that twice the
        baseline's figure means half its time), `ratio` to the baseline, and `error` with its
        `bound`. A variant outside the bound has no speed.
    Raises:
        InputError: a backend that cannot run here, or a size below 1.
    """
    device = torch.device(device)
    if min([tokens, repeats, *sizes]) < 1:
        raise InputError(
            f"sizes, tokens and repeats must be positive: {sizes}, {tokens}, {repeats}"
        )
    rows = []
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        chosen = _usable(names, device, dtype)
        for columns in sizes:
            torch.manual_seed(0)
            x = (torch.randn(tokens, columns, device=device) + 0.1).to(dtype)
            rows += _measure(
                x, chosen, repeats, {"n": columns, "tokens": tokens, "dtype": dtype_name}
            )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = f"{'n':>6} {'dtype':9} {'variant':10} {'ms':>10} {'p20':>10} {'p80':>10}"
    lines = [f"{head} {'GFLOP/s':>8} {'ratio':>6}"]
    for row in rows:
        start = f"{row['n']:>6} {row['dtype']:9} {row['variant']:10}"
        if row["ok"]:
            lines.append(
                f"{start} {row['ms']:>10.2f} {row['p20_ms']:>10.2f} {row['p80_ms']:>10.2f} "
                f"{row['gflops']:>8.0f} {row['ratio']:>6.2f}"
            )
        else:
            lines.append(f"{start} WRONG: error {row['error']:.2e}, bound {row['bound']:.2e}")
    return "\n".join(lines)


def _usable(names: Sequence[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    obstacles = {b: backends.obstacle("gram", b, device, dtype) for b in names or backends.NAMES}
    if names is None:
        # neither the float64 definition nor an interpreted kernel says anything about speed
        slow = {"reference"} if device.type == "cuda" else {"reference", "triton"}
        return [b for b, reason in obstacles.items() if reason is None and b not in slow]
    for backend, reason in obstacles.items():
        if reason is not None:
            raise InputError(f"--backends {backend} cannot run gram on {device} {dtype}: {reason}")
    return list(names)


def _measure(
    x: Tensor, names: Sequence[str], repeats: int, case: dict[str, Any]
) -> list[dict[str, Any]]:
    tokens, columns = x.shape
    bound = _bound(tokens)
    errors = {name: _error(x, name) for name in names}
    out = Moments.zeros(columns, device=x.device)
    variants: dict[str, Callable[[], Any]] = {BASELINE: lambda: x.T @ x}
    for name, error in errors.items():
        if error <= bound:
            variants[name] = partial(_accumulate, x, out, name)
    seconds = interleave(variants, repeats, x.device)
    baseline = spread(seconds[BASELINE])["ms"]

    rows = []
    for name in (BASELINE, *names):
        row: dict[str, Any] = {**case, "variant": name, "ok": name in seconds}
        if name != BASELINE:
            row |= {"error": errors[name], "bound": bound}
        if row["ok"]:
            times = spread(seconds[name])
            useful = columns * columns * tokens / times["ms"] / 1e6
            row |= {**times, "gflops": round(useful, 1), "ratio": round(baseline / times["ms"], 3)}
        rows.append(row)
    return rows


def _accumulate(x: Tensor, out: Moments, name: str) -> None:
    with _forced(name):
        gram(x, out=out)


def _error(x: Tensor, name: str) -> float:
    """Relative rms error of a square of G and of the sums, against float64."""
    with _forced(name):
        moments = gram(x)
    chosen = torch.randperm(x.shape[1], device=x.device)[:CHECKED].sort().values
    part = x[:, chosen].double()
    expected = (part.T @ part).tril()
    actual = moments.gram[chosen][:, chosen].tril().double()
    sums = part.sum(0)
    worst = max(
        ((actual - expected).norm() / expected.norm()).item(),
        ((moments.sum[chosen] - sums).norm() / sums.norm()).item(),
    )
    return worst if worst == worst else float("inf")


def _bound(tokens: int) -> float:
    """A float32 sum of T products errs by about √T roundings of 2^-24; four times that is wrong.

    Sums have a mean of a tenth of a standard deviation here, which magnifies their relative error.
    """
    return 4 * 2.0**-24 * (2 + tokens**0.5)


@contextmanager
def _forced(name: str) -> Iterator[None]:
    before = os.environ.get("LIAR_BACKEND")
    os.environ["LIAR_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIAR_BACKEND"]
        else:
            os.environ["LIAR_BACKEND"] = before


def _paths() -> dict[str, str] | None:
    """How the C++ version multiplies each dtype on this processor."""
    if _extension.unavailable() is not None:
        return None
    return {name: _extension.gram_path(dtype) for name, dtype in DTYPES.items()}

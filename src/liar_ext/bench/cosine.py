"""`liar bench cosine`: cosines of rows beside PyTorch's, and beside the diagonal of all pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liar_ext.bench import backends_of, goals
from liar_ext.bench.backends_of import DTYPES, Scale, broken
from liar_ext.bench.measure import (
    copy_rate,
    interleave,
    machine_state,
    peak_bytes,
    refuse_forcing,
    resolve_device,
    spread,
    times_as_fast,
    variable,
)
from liar_ext.bench.result import head
from liar_ext.ops import row_cosines, row_cosines_reference, self_test
from liar_ext.ops.cosine import error_bound

BASELINE = "cosine_similarity"
# what is as exact as ours for 16-bit values: float32 copies of both first
COPIED = "cosine_similarity of float32 copies"
# as the published code of depth pruning has it: a matrix of T² cosines, of which T are used
PAIRS = "diagonal of all pairs"
# bytes of that matrix and of the norms' products beside it, above which it is left out
PAIRS_BYTES = 2**32
# an error that is infinite or NaN, for JSON has neither
WRONG = 1e30
# rows of float64 copies at a time
BLOCK = 1024

DEFAULTS = {
    "cpu": Scale(4096, (4096,), ("bfloat16", "float32"), 5),
    "cuda": Scale(16384, (4096, 8192), ("bfloat16", "float16:4096", "float32:4096"), 15),
}


@dataclass(frozen=True)
class Variant:
    """One of our implementations.

    Attributes:
        backend: what LIAR_BACKEND forces. chosen: a user who forces nothing gets this one.
    """

    backend: str
    chosen: bool

    def __call__(self, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
        with variable("LIAR_BACKEND", f"cosine={self.backend}"):
            return row_cosines(x, y, valid)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench cosine`."""
    backends_of.add_arguments(parser, DEFAULTS, sizes="columns of a row", letter="D")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; `problems` of the result names what is wrong or failed.

    Raises:
        InputError: a device or a backend that is not there, or a value that makes no sense.
    """
    refuse_forcing()
    device = resolve_device(args.device)
    work = backends_of.asked(args, DEFAULTS[device.type])
    plans = {name: usable(args.backends, device, DTYPES[name]) for name, _ in work.shapes}
    before, ceiling = machine_state(), copy_rate(device) / 1e9
    rows, lost = [], []
    for name, columns in work:
        try:
            rows += run(columns, work.tokens, name, plans[name][0], work.repeats, device)
        except RuntimeError as failure:
            # out of memory, or a kernel that took the device with it: what was measured stays
            lost.append(f"{name} d={columns} failed: {' '.join(str(failure).split())[:300]}")
    for row in rows:
        if "gbytes" in row:
            row["bandwidth"] = round(row["gbytes"] / ceiling, 4)
    result = {
        **head("cosine", device, before, args.note),
        "ceilings": {"copy_gbytes": ceiling},
        "absent": {name: absent for name, (_, absent) in plans.items()},
        "rows": rows,
        "problems": [
            *lost,
            *(_problem(row) for row in rows if not row["ok"]),
            *broken({name: absent for name, (_, absent) in plans.items()}),
        ],
    }
    print(_table(result))
    print(goals.table(result))
    return result


def usable(
    names: Sequence[str] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[Variant], dict[str, str]]:
    """Our versions that run on `device` with `dtype`, and why the others do not.

    Args:
        names: backends, or None for all that run and can be fast.
    Raises:
        InputError: a backend of `names` cannot run here.
    """
    running, absent = backends_of.running("cosine", names, device, dtype)
    automatic = backends_of.automatic("cosine", device, dtype)
    return [Variant(backend, backend == automatic) for backend in running], absent


def run(
    columns: int,
    tokens: int,
    dtype: str,
    variants: Sequence[Variant],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row for each variant and case of one shape.

    Args:
        columns: d. tokens: T. dtype: key of `DTYPES`. repeats: timed rounds.
    Returns:
        rows with `ms` (median), `p20_ms`, `p80_ms`, `gbytes` (bytes a second of the rows that are
        needed, each counted once), `ratio` to `torch.nn.functional.cosine_similarity` of the same
        dtype, largest `error` of a cosine, of ours with its `bound`, and `peak_bytes`. The case
        `half` takes every second row by its index: `overhead` is its time over half of that of
        all. What is outside its bound or raised has no speed.
    """
    torch.manual_seed(0)
    x = torch.randn(tokens, columns, device=device)
    # as the states on both sides of a layer: cosines of about 0.9
    y = (x + 0.5 * torch.randn(tokens, columns, device=device)).to(DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    half = torch.arange(0, tokens, 2, device=device)
    shape = {"n": columns, "tokens": tokens, "dtype": dtype}
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}

    def add(call: Callable[[], Any], row: dict[str, Any]) -> None:
        if row["ok"] and "reason" not in row:
            calls[str(len(rows))] = call
        rows.append({**shape, **row})

    for name, call in _library(x.dtype):
        add(partial(call, x, y), _library_row(name, call, x, y))
    for variant in variants:
        for case, valid in (("all", None), ("half", half)):
            add(partial(variant, x, y, valid), _checked(variant, case, x, y, valid))
    seconds = interleave(calls, repeats, device)
    _add_times(rows, {int(at): times for at, times in seconds.items()}, x.element_size())
    return rows


def _library(dtype: torch.dtype) -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    found: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        (BASELINE, lambda x, y: F.cosine_similarity(x, y, dim=1))
    ]
    if dtype != torch.float32:
        found.append((COPIED, lambda x, y: F.cosine_similarity(x.float(), y.float(), dim=1)))
    return [*found, (PAIRS, _diagonal)]


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    norms = torch.outer(x.norm(dim=1), y.norm(dim=1))
    return ((x @ y.T) / norms).diagonal()


def _library_row(
    name: str, call: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "case": "all", "ours": False, "ok": True}
    needed = 3 * x.shape[0] ** 2 * x.element_size()
    if name == PAIRS and needed > PAIRS_BYTES:
        return row | {"reason": f"its matrices of {x.shape[0]} tokens take {needed >> 20} MiB"}
    row["error"] = _error(call(x, y), x, y, None)
    return row | {"peak_bytes": peak_bytes(lambda: call(x, y), x.device)}


def _checked(
    variant: Variant, case: str, x: Tensor, y: Tensor, valid: Tensor | None
) -> dict[str, Any]:
    """A row with the error of a first call; `ok` only if that is within the bound, and the
    self-test, which has rows of every kind."""
    bound = error_bound(x.shape[1])
    row: dict[str, Any] = {
        "variant": variant.backend,
        "case": case,
        "ours": True,
        "chosen": variant.chosen,
        "bound": bound,
    }
    try:
        found, allowed = self_test.cosine_error(variant, x.device, x.dtype)
        if not found <= allowed:
            return row | {"ok": False, "error": min(found, WRONG), "bound": allowed}
        row["error"] = _error(variant(x, y, valid), x, y, valid)
        row["ok"] = row["error"] <= bound
        row["peak_bytes"] = peak_bytes(lambda: variant(x, y, valid), x.device)
    except Exception as failure:
        # one kernel that does not launch must not cost the figures of the others
        return row | {"ok": False, "failed": f"{type(failure).__name__}: {failure}"}
    return row


def _error(found: Tensor, x: Tensor, y: Tensor, valid: Tensor | None) -> float:
    """Largest difference to the definition."""
    rows = torch.arange(x.shape[0], device=x.device) if valid is None else valid
    worst = 0.0
    for own, part in zip(rows.split(BLOCK), found.double().split(BLOCK), strict=True):
        difference = (part - row_cosines_reference(x, y, own)).abs().max()
        value = float(difference)
        worst = max(worst, value if value < WRONG else WRONG)
    return worst


def _add_times(rows: list[dict[str, Any]], seconds: dict[int, list[float]], item: int) -> None:
    """Times and what follows from them, in place; row 0 is the baseline."""
    whole = {rows[at]["variant"]: s for at, s in seconds.items() if rows[at]["case"] == "all"}
    for at, times in seconds.items():
        row = rows[at]
        row |= spread(times)
        needed = row["tokens"] if row["case"] == "all" else -(-row["tokens"] // 2)
        row["gbytes"] = float(f"{2 * needed * row['n'] * item / row['ms'] / 1e6:.5g}")
        if row["case"] == "all":
            row["ratio"] = round(times_as_fast(times, seconds[0]), 3)
        elif row["variant"] in whole:
            share = needed / row["tokens"]
            row["overhead"] = round(times_as_fast(whole[row["variant"]], times) / share - 1, 4)


def _problem(row: dict[str, Any]) -> str:
    where = f"{row['variant']} {row['case']} {row['dtype']} d={row['n']}"
    if "failed" in row:
        return f"{where} failed: {' '.join(row['failed'].split())[:300]}"
    return f"{where} is wrong: error {row['error']:.2e}, bound {row['bound']:.2e}"


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"copy {result['ceilings']['copy_gbytes']:.3g} GB/s",
        f"{'d':>6} {'tokens':>6} {'dtype':9} {'variant':35} {'case':4} {'ms':>10} {'p20':>10} "
        f"{'p80':>10} {'GB/s':>8} {'share':>6} {'ratio':>7} {'error':>8}",
    ]
    for row in result["rows"]:
        start = f"{row['n']:>6} {row['tokens']:>6} {row['dtype']:9} {row['variant']:35} "
        start += f"{row['case']:4}"
        if not row["ok"]:
            lines.append(f"{start} {'FAILED' if 'failed' in row else 'WRONG'}: {_problem(row)}")
        elif "reason" in row:
            lines.append(f"{start} not run: {row['reason']}")
        else:
            ratio = f"{row['ratio']:>7.2f}" if "ratio" in row else " " * 7
            lines.append(
                f"{start} {row['ms']:>10.4g} {row['p20_ms']:>10.4g} {row['p80_ms']:>10.4g} "
                f"{row['gbytes']:>8.3g} {row['bandwidth']:>6.2f} {ratio} {row['error']:>8.1e}"
            )
    for dtype, absent in result["absent"].items():
        lines += [f"{dtype} not on {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)

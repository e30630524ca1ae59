"""`liar bench gram`: Gram accumulation beside `x.T @ x` of the same dtype, in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liar_ext.bench import backends_of, goals
from liar_ext.bench.backends_of import DTYPES, Scale, broken
from liar_ext.bench.gram_checks import (
    Case,
    bound,
    diagonal_bias,
    gram_error,
    moments_error,
)
from liar_ext.bench.gram_variants import BASELINE, QUACK, Variant, product_only, quack, usable
from liar_ext.bench.measure import (
    copy_rate,
    interleave,
    machine_state,
    matmul_rate,
    peak_bytes,
    refuse_forcing,
    resolve_device,
    spread,
    times_as_fast,
)
from liar_ext.bench.result import head
from liar_ext.errors import InputError
from liar_ext.ops import Moments, _extension, _native_gram
from liar_ext.ops.precision import full_precision

TRIANGLE = Case()

# one flush of tokens on a CPU, a calibration batch on a GPU; the widths of LLaMA-like FFNs
DEFAULTS = {
    "cpu": Scale(4096, (4096, 11008), ("float32", "bfloat16"), 5),
    "cuda": Scale(
        32768, (4096, 11008, 14336, 28672), ("bfloat16", "float16:11008", "float32:11008"), 15
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench gram`."""
    backends_of.add_arguments(parser, DEFAULTS, sizes="columns", letter="N")
    parser.add_argument(
        "--keep",
        type=float,
        nargs="*",
        default=[0.5, 0.8],
        metavar="F",
        help="extraction of these fractions of the columns; default 0.5 0.8, none with no value",
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; `problems` of the result names what is wrong or failed.

    Raises:
        InputError: a device or a backend that is not there, or a value that makes no sense.
    """
    refuse_forcing()
    device = resolve_device(args.device)
    work = backends_of.asked(args, DEFAULTS[device.type])
    if not all(0 < fraction < 1 for fraction in args.keep):
        raise InputError(f"--keep {' '.join(map(str, args.keep))}: fractions lie between 0 and 1")
    plans = {name: usable(args.backends, device, DTYPES[name]) for name, _ in work.shapes}
    before = machine_state()
    ceilings: dict[str, Any] = {
        "matmul_gflops": {n: matmul_rate(DTYPES[n], device) / 1e9 for n in dict(work.shapes)},
        "copy_gbytes": copy_rate(device) / 1e9,
    }
    rows, lost = [], []
    for name, columns in work:
        try:
            found = run(
                *(columns, work.tokens, name, plans[name][0], work.repeats, device, args.keep)
            )
        except RuntimeError as failure:
            # out of memory, or a kernel that took the device with it: what was measured stays
            lost.append(f"{name} n={columns} failed: {' '.join(str(failure).split())[:300]}")
            continue
        rows += with_share(found, ceilings["matmul_gflops"][name])
    result = {
        **head("gram", device, before, args.note),
        "multiprocessors": _multiprocessors(device),
        "extension": _paths() if device.type == "cpu" else None,
        "ceilings": ceilings,
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


def run(
    columns: int,
    tokens: int,
    dtype: str,
    variants: Sequence[Variant],
    repeats: int,
    device: torch.device,
    keep: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """One row for each variant and case of one shape.

    Args:
        columns: n. tokens: T. dtype: key of `DTYPES`. repeats: timed rounds.
        keep: fractions of the columns to extract, in cases of their own.
    Returns:
        rows with `ms` (median), `p20_ms`, `p80_ms`, `gflops` of useful work (n²T for the triangle,
        so that twice the baseline's figure means half its time), `error` with its `bound`; the
        triangle with `ratio` to the baseline, `bias` and `peak_bytes`; the other cases with what
        they cost beside the triangle. What is outside its bound or raised has no speed.
    """
    torch.manual_seed(0)
    x = (torch.randn(tokens, columns, device=device) + 0.1).to(DTYPES[dtype])
    shape = {"n": columns, "tokens": tokens, "dtype": dtype}
    rows: list[dict[str, Any]] = []
    calls: dict[int, Callable[[], Any]] = {}

    def add(call: Callable[[], Any], row: dict[str, Any]) -> None:
        if row["ok"]:
            calls[len(rows)] = call
        rows.append({**shape, **row})

    with full_precision():
        add(lambda: x.T @ x, _baseline_row(x))
        rival = quack(device, x.dtype)
        if not isinstance(rival, str):
            add(partial(rival, x), _rival_row(x, rival))
        # one for each case, whatever the version: 28672² float32 numbers are 3 GB
        made = {case: (case.token_mask(x), case.moments(x)) for case in _all_cases(keep)}
        for variant in variants:
            if variant.setting is not None and not _native_gram.readable(x):
                # its rows would have to be copied first, which is no matter of settings
                continue
            for case in _cases(variant, keep):
                mask, out = made[case]
                add(partial(_call, x, variant, case, mask, out), _checked(x, variant, case, mask))
        named = {str(at): call for at, call in calls.items()}
        seconds = {int(at): s for at, s in interleave(named, repeats, device).items()}
    if isinstance(rival, str) and device.type == "cuda":
        rows.append({**shape, "variant": QUACK, "case": "triangle", "ok": True, "reason": rival})
    _add_times(rows, seconds)
    return rows


def _all_cases(keep: Sequence[float]) -> list[Case]:
    panels = [Case("keep", f, order) for f in keep for order in ("prefix", "scattered")]
    return [TRIANGLE, Case("mask"), Case("product"), *panels]


def _cases(variant: Variant, keep: Sequence[float]) -> list[Case]:
    if variant.setting is not None:
        return [TRIANGLE]
    # the portable version in plain torch is a second baseline unless it is all there is
    if variant.backend in ("torch", "reference") and not variant.chosen:
        return [TRIANGLE]
    # only the Triton version can leave the sums out
    triton = variant.backend == "triton"
    return [case for case in _all_cases(keep) if triton or case.kind != "product"]


def _call(x: Tensor, variant: Variant, case: Case, mask: Tensor | None, out: Moments) -> Moments:
    if case.kind != "product":
        return variant.accumulate(x, mask, out)
    with variant.forced():
        product_only(x, out.gram)
    return out


def _baseline_row(x: Tensor) -> dict[str, Any]:
    return {
        "variant": BASELINE,
        "case": "triangle",
        "ours": False,
        "ok": True,
        "error": gram_error(x, x.T @ x),
        "peak_bytes": peak_bytes(lambda: x.T @ x, x.device),
    }


def _rival_row(x: Tensor, product: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": QUACK, "case": "triangle", "ours": False}
    try:
        error = gram_error(x, product(x))
    except Exception as failure:
        # not ours to fix: the row says why it has no speed, and the run goes on
        return row | {"ok": True, "reason": f"{type(failure).__name__}: {failure}"}
    row |= {"ok": error <= bound(x.shape[0]), "error": error, "bound": bound(x.shape[0])}
    return row | {"peak_bytes": peak_bytes(lambda: product(x), x.device)}


def _checked(x: Tensor, variant: Variant, case: Case, mask: Tensor | None) -> dict[str, Any]:
    """A row with the errors of a first call; `ok` only if they are within the bound."""
    row: dict[str, Any] = {
        "variant": variant.name,
        "case": case.name,
        "ours": True,
        "chosen": variant.chosen,
    }
    if variant.setting is not None:
        row["setting"] = asdict(variant.setting)
    try:
        made = _call(x, variant, case, mask, case.moments(x))
        error = gram_error(x, made.gram) if case.kind == "product" else moments_error(x, mask, made)
        row |= {"ok": error <= bound(x.shape[0]), "error": error, "bound": bound(x.shape[0])}
        if row["ok"] and case == TRIANGLE:
            row["bias"] = diagonal_bias(x, lambda y: variant.accumulate(y).gram)
            row["peak_bytes"] = peak_bytes(lambda: variant.accumulate(x), x.device)
    except Exception as failure:
        # one kernel that does not launch must not cost the figures of the others
        return row | {"ok": False, "failed": f"{type(failure).__name__}: {failure}"}
    return row


def _add_times(rows: list[dict[str, Any]], seconds: dict[int, list[float]]) -> None:
    """Times and what follows from them, in place; row 0 is the baseline."""
    triangles = {rows[at]["variant"]: s for at, s in seconds.items() if _case(rows[at]) == TRIANGLE}
    for at, times in seconds.items():
        row, case = rows[at], _case(rows[at])
        row |= spread(times)
        useful = case.flops(row["tokens"], row["n"])
        row["gflops"] = float(f"{useful / row['ms'] / 1e6:.5g}")
        if case == TRIANGLE:
            row["ratio"] = round(times_as_fast(times, seconds[0]), 3)
        elif row["variant"] in triangles:
            whole = triangles[row["variant"]]
            if case.kind == "keep":
                beside = times_as_fast(whole, times)
                row["extraction"] = round(beside / case.tile_share(row["n"]), 3)
            elif case.kind == "product":
                # the sums are what the triangle takes on top of it
                row["overhead"] = round(times_as_fast(times, whole) - 1, 4)
            else:
                row["overhead"] = round(times_as_fast(whole, times) - 1, 4)


def _case(row: dict[str, Any]) -> Case:
    kind, *rest = row["case"].split()
    return Case(kind, float(rest[0]), rest[1]) if rest else Case(kind)


def with_share(rows: list[dict[str, Any]], ceiling: float) -> list[dict[str, Any]]:
    """The rows with `share`: useful rate over the measured rate of a large product."""
    timed = [row for row in rows if "gflops" in row]
    for row in timed:
        row["share"] = round(row["gflops"] / ceiling, 4)
    return rows


def _problem(row: dict[str, Any]) -> str:
    where = f"{row['variant']} {row['case']} {row['dtype']} n={row['n']}"
    if "failed" in row:
        return f"{where} failed: {' '.join(row['failed'].split())[:300]}"
    return f"{where} is wrong: error {row['error']:.2e}, bound {row['bound']:.2e}"


def _table(result: dict[str, Any]) -> str:
    rates = result["ceilings"]
    lines = [
        "matmul "
        + ", ".join(f"{n} {v / 1e3:.3g} TFLOP/s" for n, v in rates["matmul_gflops"].items())
        + f"; copy {rates['copy_gbytes']:.3g} GB/s",
        f"{'n':>6} {'dtype':9} {'variant':18} {'case':19} {'ms':>10} {'p20':>10} {'p80':>10} "
        f"{'TFLOP/s':>8} {'share':>6} {'ratio':>6} {'beside':>7} "
        f"{'error':>8} {'bias':>9} {'MiB':>7}",
    ]
    for row in result["rows"]:
        start = f"{row['n']:>6} {row['dtype']:9} {row['variant']:18} {row['case']:19}"
        if not row["ok"]:
            lines.append(f"{start} {'FAILED' if 'failed' in row else 'WRONG'}: {_problem(row)}")
        elif "reason" in row:
            lines.append(f"{start} not run: {row['reason']}")
        else:
            lines.append(f"{start} {_figures(row)}".rstrip())
    for dtype, absent in result["absent"].items():
        lines += [f"{dtype} not on {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> str:
    beside = row.get("extraction", row.get("overhead"))
    peak = row.get("peak_bytes")
    cells = [
        f"{row['ms']:>10.4g} {row['p20_ms']:>10.4g} {row['p80_ms']:>10.4g}",
        f"{row['gflops'] / 1e3:>8.3g} {row['share']:>6.2f}",
        _cell(row.get("ratio"), "6.2f"),
        _cell(beside, "7.3f"),
        _cell(row.get("error"), "8.1e"),
        _cell(row.get("bias"), "9.1e"),
        _cell(None if peak is None else peak / 2**20, "7.0f"),
    ]
    return " ".join(cells)


def _cell(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else f"{value:>{form}}"


def _multiprocessors(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _paths() -> dict[str, str] | None:
    """How the C++ version multiplies each dtype on this processor."""
    if _extension.unavailable() is not None:
        return None
    return {name: _extension.gram_path(dtype) for name, dtype in DTYPES.items()}

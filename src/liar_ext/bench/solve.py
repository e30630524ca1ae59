"""`liar bench solve`: the batched ridge solve beside the Cholesky of `torch.linalg`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liar_ext.bench import goals
from liar_ext.bench.backends_of import SELF_TEST
from liar_ext.bench.measure import (
    interleave,
    machine_state,
    matmul_rate,
    refuse_forcing,
    resolve_device,
    spread,
    times_as_fast,
    variable,
)
from liar_ext.bench.result import head
from liar_ext.bench.solve_systems import Systems, conditioned, systems
from liar_ext.errors import InputError, LiarError
from liar_ext.ops import attempt, backends, solve
from liar_ext.ops._native_solve import MAXIMUM
from liar_ext.ops.precision import full_precision
from liar_ext.ops.solve import Solved, working_dtype

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TRIANGULAR, SOLVE = "cholesky_ex + solve_triangular", "cholesky_ex + cholesky_solve"
BASELINE = f"{TRIANGULAR} float64"
# the library's ways to a result as exact as ours
EXACT = (BASELINE, f"{SOLVE} float64")
# a wrong result, not an inexact one: the systems that are timed are well conditioned
BOUND = 1e-6
# at the last one float32 Moments say nothing any more: the ladder must be seen to say so
CONDITIONS = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e10)
CONDITIONED = (256, 64)

CASES = {
    "cpu": ("16x128", "4x768", "1x2048"),
    # heads of 64 and 128, BERT's twelve layers at half of 3072, and halves of LLaMA-like FFNs
    "cuda": ("64x128", "256x64", "12x1536", "1x5504", "1x11008"),
}


@dataclass(frozen=True)
class Variant:
    """Attributes:

    backend: what LIAR_BACKEND forces. precision: argument of `solve`.
    chosen: a user who asks for nothing gets this one.
    """

    backend: str
    precision: Any
    chosen: bool

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    def solve(self, system: Systems, moments_dtype: torch.dtype = torch.float32) -> Solved:
        with variable("LIAR_BACKEND", f"solve={self.backend}"):
            return solve(
                system.matrix,
                system.right,
                system.ridge,
                mean_kept=system.mean_kept,
                mean_dropped=system.mean_dropped,
                moments_dtype=moments_dtype,
                precision=self.precision,
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `liar bench solve`."""
    parser.add_argument(
        "--cases",
        nargs="*",
        metavar="BxS[xR]",
        help="b systems of s kept and r dropped columns (r = s if not given); default on a CPU "
        f"{' '.join(CASES['cpu'])}, on a GPU {' '.join(CASES['cuda'])}",
    )
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES)
    parser.add_argument("--repeats", type=int, help="default 7, on a GPU 15")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--note", default="", help="a remark kept in the result")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; `problems` of the result names what is wrong or failed.

    Raises:
        InputError: a device or a backend that is not there, or a case that makes no sense.
    """
    refuse_forcing()
    device = resolve_device(args.device)
    repeats = {"cpu": 7, "cuda": 15}[device.type] if args.repeats is None else args.repeats
    if repeats < 1:
        raise InputError(f"--repeats {repeats}: must be at least 1")
    cases = [_case(spec) for spec in (CASES[device.type] if args.cases is None else args.cases)]
    variants, absent = _variants(args.backends, device)
    before = machine_state()
    rates = {name: matmul_rate(dtype, device) / 1e9 for name, dtype in DTYPES.items()}
    rows, lost = [], []
    for batch, kept, dropped in cases:
        try:
            rows += run(batch, kept, dropped, variants, repeats, device)
        except RuntimeError as failure:
            # out of memory, or a kernel that took the device with it: what was measured stays
            reason = " ".join(str(failure).split())[:300]
            lost.append(f"{batch}x{kept}x{dropped} failed: {reason}")
    for row in rows:
        if "gflops" in row:
            row["share"] = round(row["gflops"] / rates["float64"], 4)
    try:
        rows += accuracy(CONDITIONS, variants, device)
    except RuntimeError as failure:
        lost.append(f"accuracy failed: {' '.join(str(failure).split())[:300]}")
    result = {
        **head("solve", device, before, args.note),
        "ceilings": {"matmul_gflops": rates},
        "absent": absent,
        "rows": rows,
        "problems": [
            *lost,
            *(_problem(row) for row in rows if not row["ok"]),
            *(f"{name}: {reason}" for name, reason in absent.items() if SELF_TEST in reason),
        ],
    }
    print(_table(result))
    print(_accuracy_table(rows))
    print(goals.table(result))
    return result


def run(
    batch: int,
    kept: int,
    dropped: int,
    variants: Sequence[Variant],
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row for each variant of one batch; ours include ridge, scaling, P and all diagnostics.

    Returns:
        rows with `ms` (median), `p20_ms`, `p80_ms`, `gflops` (s³/3 + 2s²r for each system),
        `ratio` to the library's float64 Cholesky and two triangular solves (which get `A + λI`
        ready made), `slowdown` over the faster of its float64 ways, `forward_error` of Q and
        `backward_error`, worst of the batch. What is wrong or raised has no speed.
    """
    system = systems(batch, kept, dropped, device)
    shape = {"kind": "time", "batch": batch, "s": kept, "r": dropped}
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    with full_precision():
        for name, call in _library(system):
            rows.append({**shape, "variant": name, "ours": False, "ok": True})
            rows[-1] |= _errors(system, call())
            calls[name] = call
        for variant in variants:
            rows.append({**shape, **_checked(system, variant)})
            if rows[-1]["ok"]:
                calls[variant.name] = partial(variant.solve, system)
            if variant.chosen and variant.backend == "cuda" and kept <= MAXIMUM:
                row, replay = _replayed(system, variant)
                rows.append(shape | row)
                calls |= {} if replay is None else {row["variant"]: replay}
        seconds = interleave(calls, repeats, device)
    for row in rows:
        if row["variant"] in seconds:
            times = seconds[row["variant"]]
            row |= spread(times)
            row["gflops"] = float(f"{system.flops / row['ms'] / 1e6:.5g}")
            row["ratio"] = round(times_as_fast(times, seconds[BASELINE]), 3)
            row["slowdown"] = round(max(times_as_fast(seconds[n], times) for n in EXACT), 3)
    return rows


def accuracy(
    conditions: Sequence[float], variants: Sequence[Variant], device: torch.device
) -> list[dict[str, Any]]:
    """Forward error of Q at each condition, for Moments that were summed in float32 and float64.

    With float32 Moments a condition near 1/eps is refused and climbs the ladder of ridges: then
    `steps` says so, and the error is that of another system.
    """
    rows: list[dict[str, Any]] = []
    for condition in conditions:
        system = conditioned(condition, *CONDITIONED, device)
        shape = {"kind": "condition", "s": CONDITIONED[0], "r": CONDITIONED[1]}
        shape["condition"] = condition
        for name, call in _library(system):
            if name.startswith(TRIANGULAR):
                row = {**shape, "variant": name, "ours": False, "ok": True}
                rows.append(row | _errors(system, call()))
        for variant in variants:
            for moments in DTYPES:
                row = {**shape, "moments": moments}
                row |= _checked(system, variant, DTYPES[moments], float("inf"))
                rows.append(row)
    return rows


def _replayed(system: Systems, variant: Variant) -> tuple[dict[str, Any], Callable[[], Any] | None]:
    """`attempt` as a CUDA graph: what the kernel takes, without Python and the wait for its word.

    The row, and what replays it.
    """
    row: dict[str, Any] = {"variant": f"{variant.name} attempt, in a graph", "ours": True}
    row["chosen"] = False
    strength = system.ridge * system.matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    arguments = (system.matrix, system.right, strength, system.mean_kept, system.mean_dropped)
    try:
        with variable("LIAR_BACKEND", f"solve={variant.backend}"):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                attempt(*arguments)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = attempt(*arguments)
        graph.replay()
        errors = _errors(system, found.solution)
    except (LiarError, RuntimeError) as failure:
        return row | {"ok": False, "failed": f"{type(failure).__name__}: {failure}"}, None
    row |= errors | {"ok": errors["forward_error"] <= BOUND}
    # a graph does not keep what its kernels read and write
    return row, partial(lambda replay, *_: replay(), graph.replay, arguments, found)


def _library(system: Systems) -> list[tuple[str, Callable[[], Tensor]]]:
    found: list[tuple[str, Callable[[], Tensor]]] = []
    for name, dtype in DTYPES.items():
        matrix, right = system.ridged.to(dtype), system.right.to(dtype)
        found += [
            (f"{TRIANGULAR} {name}", partial(_triangular, matrix, right)),
            (f"{SOLVE} {name}", partial(_cholesky_solve, matrix, right)),
        ]
    return found


def _triangular(matrix: Tensor, right: Tensor) -> Tensor:
    lower, _ = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def _cholesky_solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix)[0])


def _errors(system: Systems, solution: Tensor) -> dict[str, Any]:
    return {
        "forward_error": system.forward_error(solution),
        "backward_error": system.backward_error(solution),
    }


def _checked(
    system: Systems,
    variant: Variant,
    moments_dtype: torch.dtype = torch.float32,
    bound: float = BOUND,
) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant.name, "ours": True, "chosen": variant.chosen}
    try:
        solved = variant.solve(system, moments_dtype)
    except (LiarError, RuntimeError, ValueError) as failure:
        return row | {"ok": False, "failed": f"{type(failure).__name__}: {failure}"}
    row |= _errors(system, solved.solution)
    shift = system.shift_error(solved.shift)
    found = solved.diagnostics
    return row | {
        "ok": row["forward_error"] <= bound and shift <= bound,
        "shift_error": shift,
        "reported_condition": max(d.condition for d in found),
        "reported_backward_error": max(d.backward_error for d in found),
        "precision": sorted({d.precision for d in found}),
        "steps": [step for d in found for step in d.steps][:8],
    }


def _case(spec: str) -> tuple[int, int, int]:
    parts = spec.split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--cases {spec}: give BxS or BxSxR, as in 64x128 or 1x5504x2752")
    batch, kept, *rest = map(int, parts)
    return batch, kept, rest[0] if rest else kept


def _variants(
    names: Sequence[str] | None, device: torch.device
) -> tuple[list[Variant], dict[str, str]]:
    default = working_dtype("auto", device)
    with variable("LIAR_BACKEND", None):
        automatic = backends.select("solve", device, default).backend
    found, absent = [], {}
    # the definition works by eigenvalues and LU: its time says nothing
    for name in names or [name for name in backends.NAMES if name != "reference"]:
        reason = backends.obstacle("solve", name, device, default)
        if reason is not None:
            if names is not None:
                raise InputError(f"--backends {name} cannot run solve on {device}: {reason}")
            absent[name] = reason
            continue
        for precision, dtype in DTYPES.items():
            found.append(Variant(name, precision, name == automatic and dtype == default))
    return found, absent


def _problem(row: dict[str, Any]) -> str:
    where = f"{row['variant']} {row['s']}²"
    if "failed" in row:
        return f"{where} failed: {' '.join(row['failed'].split())[:300]}"
    return f"{where} is wrong: error {row['forward_error']:.1e}, bound {BOUND:.0e}"


def _table(result: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{n} {v / 1e3:.3g} TFLOP/s" for n, v in result["ceilings"]["matmul_gflops"].items()
    )
    lines = [
        f"matmul {rates}",
        f"{'batch':>5} {'s':>6} {'r':>6} {'variant':39} {'ms':>10} {'p20':>10} {'p80':>10} "
        f"{'GFLOP/s':>8} {'share':>6} {'ratio':>6} {'forward':>8} {'backward':>8}",
    ]
    for row in result["rows"]:
        if row["kind"] != "time":
            continue
        start = f"{row['batch']:>5} {row['s']:>6} {row['r']:>6} {row['variant']:39}"
        if not row["ok"]:
            lines.append(f"{start} {'FAILED' if 'failed' in row else 'WRONG'}: {_problem(row)}")
            continue
        lines.append(
            f"{start} {row['ms']:>10.4g} {row['p20_ms']:>10.4g} {row['p80_ms']:>10.4g} "
            f"{row['gflops']:>8.3g} {row['share']:>6.2f} {row['ratio']:>6.2f} "
            f"{row['forward_error']:>8.1e} {row['backward_error']:>8.1e}"
        )
    lines += [f"not on {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def _accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'condition':>9} {'variant':39} {'moments':8} {'forward':>8} {'backward':>8} steps"]
    for row in rows:
        if row["kind"] != "condition":
            continue
        start = f"{row['condition']:>9.0e} {row['variant']:39} {row.get('moments', ''):8}"
        if "failed" in row:
            lines.append(f"{start} FAILED: {_problem(row)}")
            continue
        steps = "; ".join(row.get("steps", []))
        figures = f"{row['forward_error']:>8.1e} {row['backward_error']:>8.1e}"
        lines.append(f"{start} {figures} {steps}".rstrip())
    return "\n".join(lines)

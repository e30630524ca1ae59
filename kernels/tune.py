"""The autotuner: times every candidate configuration on this device and writes the best ones.

A candidate that is wrong is reported and never timed, whatever its speed. What is timed is the
whole operation, column sums and packing included.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from liar_ext.errors import BackendError
from liar_ext.kernels import config as configs
from liar_ext.kernels import products, runtime
from liar_ext.kernels.config import DTYPES, KERNELS, Entry, ProductConfig, Table
from liar_ext.kernels.gram import accumulate

# relative rms error of G on data without a negative number, where truncation has one sign. Sums of
# T products rounded to nearest err by less than 4e-7 for the tokens checked
BOUND = 1e-6

# tokens of the check: several flushes of every candidate, and not a multiple of a step
CHECKED_TOKENS = 4099

WARM_UP, REPEATS = 2, 7


def longest_sum(dtype: str, architecture: int) -> int:
    """Tokens that a tensor core may add up by itself with a bias below 1e-6 on positive data.

    It aligns the products of a step to the largest term and drops what is below two more bits (one
    on an A100) than float32 has, and truncates the result; products of float16 have more bits to
    lose. Simulated after the published models of these units (arXiv 2512.07004), one sum of
    |normal| values came to -7.2e-7 (bfloat16, 384 tokens) and -7.0e-7 (float16, 192) on an H100,
    -7.1e-7 (256) and -8.3e-7 (128) on an A100. An H200 had -7.1e-7 (bfloat16, 384 tokens).
    """
    tokens = 384 if dtype == "bfloat16" else 192
    return tokens if architecture >= 90 else tokens * 2 // 3


def candidates(kernel: str, dtype: str, architecture: int) -> list[ProductConfig]:
    """The configurations worth timing; tests/kernels compiles each for its architecture.

    Args:
        kernel: one of `KERNELS`. dtype: one of `DTYPES`. architecture: 80, 90 or 100.
    """
    if dtype == "float32":
        shapes = {
            ("pointer", 80): [(128, 16, 4), (64, 32, 3)],
            ("pointer", 90): [(128, 32, 3), (128, 32, 4)],
            # 64: Triton 3.6 gives each of the six products its own tensor memory, and 128 columns
            # for each are more than there are
            ("pointer", 100): [(64, 32, 3)],
            ("descriptor", 90): [(128, 32, 3), (128, 32, 4), (128, 64, 2)],
            ("descriptor", 100): [(64, 32, 3)],
        }
        return [
            ProductConfig(block, block_t, warps=8 if block == 128 else 4, stages=stages, flush=1)
            for block, block_t, stages in shapes.get((kernel, architecture), [])
        ]
    # tokens of a step, stages, and whether its product goes into the second sum at once
    steps = {
        ("pointer", 80): [(32, 4, False), (32, 5, False), (32, 4, True), (64, 3, True)],
        ("pointer", 90): [(64, 3, False), (64, 4, False), (64, 3, True)],
        ("pointer", 100): [(64, 3, False), (64, 3, True)],
        ("descriptor", 90): [
            *((64, 4, False), (64, 5, False), (64, 6, False)),
            *((128, 3, False), (128, 3, True)),
        ],
        ("descriptor", 100): [(64, 4, False), (64, 4, True)],
    }.get((kernel, architecture), [])
    longest = longest_sum(dtype, architecture)
    large = [
        ProductConfig(
            128, block_t, warps=8, stages=stages, flush=1 if at_once else longest // block_t
        )
        for block_t, stages, at_once in steps
    ]
    # more tiles where there are few columns
    block_t = 32 if architecture == 80 else 64
    small = ProductConfig(64, block_t, warps=4, stages=4, flush=longest // block_t)
    return list(dict.fromkeys([small, *large])) if large else []


def tune(
    sizes: Sequence[int],
    tokens: int,
    dtypes: Sequence[str | torch.dtype] = ("bfloat16", "float32"),
    out: Path | str | None = None,
    *,
    kernels: Sequence[str] = KERNELS,
    device: torch.device | str | None = None,
    only: Sequence[ProductConfig] | None = None,
    repeats: int = REPEATS,
) -> list[dict[str, Any]]:
    """Check and time every candidate for Gram matrices of `sizes` columns.

    Args:
        sizes: columns n; the best configuration of one serves matrices up to it, and that of the
            largest all above. tokens: T.
        dtypes: of x, those of `DTYPES`, as torch dtypes or by name.
        out: file for the table of this device (`device_file` is where the kernels look for it);
            entries of other sizes and dtypes in it are kept. None writes nothing.
        kernels: those to try. device: None for the current CUDA device.
        only: these candidates instead of `candidates(...)`.
        repeats: timed calls of each; the median counts.
    Returns:
        a row for each candidate: kernel, dtype, columns, tokens, config, error, bound, ok, ms (None
        if wrong or impossible), reason (why), best (of its kernel, dtype and columns).
    Raises:
        ValueError: unknown dtypes or kernels, or no size.
        BackendError: there is no CUDA device and no interpreter.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    if not (sizes and names and kernels and {*names} <= {*DTYPES} and {*kernels} <= {*KERNELS}):
        raise ValueError(
            f"sizes {list(sizes)}, dtypes {names}, kernels {list(kernels)}: give at least one of "
            f"each, dtypes of {', '.join(DTYPES)} and kernels of {', '.join(KERNELS)}"
        )
    if device is None:
        if not torch.cuda.is_available() and not runtime.INTERPRET:
            raise BackendError("tuning needs a CUDA device, and torch sees none")
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    for dtype in names:
        for columns in sizes:
            x = torch.randn(tokens, columns, device=where).to(getattr(torch, dtype))
            for kernel in kernels:
                chosen = _candidates(kernel, dtype, where) if only is None else only
                group = [_row(x, kernel, config, repeats) for config in chosen]
                timed = [row for row in group if row["ms"] is not None]
                for row in group:
                    row["best"] = bool(timed) and row is min(timed, key=lambda r: r["ms"])
                rows += group
    if out is not None:
        _write(rows, _name(where), max(sizes), Path(out))
    return rows


def device_file(device: torch.device | str = "cuda") -> Path:
    """Where the kernels look for the table of a device."""
    slug = re.sub(r"[^a-z0-9]+", "_", _name(torch.device(device)).lower()).strip("_")
    return configs.FOLDER / f"{slug}.json"


def _name(device: torch.device) -> str:
    return "interpreter" if device.type != "cuda" else runtime.device_name(device)


def _candidates(kernel: str, dtype: str, device: torch.device) -> list[ProductConfig]:
    if runtime.interprets(device):
        return [products.INTERPRETED_PLANES if dtype == "float32" else products.INTERPRETED]
    newest = max(arch for arch in (80, 90, 100) if arch <= runtime.capability(device))
    return candidates(kernel, dtype, newest)


def _row(x: Tensor, kernel: str, config: ProductConfig, repeats: int) -> dict[str, Any]:
    """Check one candidate, then time it."""
    tokens, columns = x.shape
    row: dict[str, Any] = {
        "kernel": kernel,
        "dtype": str(x.dtype).removeprefix("torch."),
        "columns": columns,
        "tokens": tokens,
        "config": asdict(config),
        "error": None,
        "bound": BOUND,
        "ok": False,
        "ms": None,
        "reason": None,
    }
    try:
        row["error"] = _error(x[:CHECKED_TOKENS].abs(), kernel, config)
    except BackendError as error:
        row["reason"] = str(error)
        return row
    row["ok"] = row["error"] <= BOUND
    if not row["ok"]:
        row["reason"] = f"relative error {row['error']:.3g} > {BOUND:.3g}: not timed"
        return row
    gram = torch.zeros(columns, columns, device=x.device)
    sums = torch.zeros(columns, dtype=torch.float64, device=x.device)
    row["ms"] = _milliseconds(
        lambda: accumulate(x, None, None, gram, sums, kernel=kernel, config=config),
        x.device,
        repeats,
    )
    return row


def _error(x: Tensor, kernel: str, config: ProductConfig) -> float:
    """Relative rms error of the lower triangle and of the sums against float64, the larger one."""
    columns = x.shape[1]
    gram = torch.zeros(columns, columns, device=x.device)
    sums = torch.zeros(columns, dtype=torch.float64, device=x.device)
    accumulate(x, None, None, gram, sums, kernel=kernel, config=config)
    exact = x.double()
    # in panels: the float64 matrix of 28672 columns has 6.6 GB
    wrong = norm = 0.0
    for start in range(0, columns, 2048):
        expected = exact[:, start:].T @ exact[:, start : start + 2048]
        expected = expected.tril()
        found = gram[start:, start : start + 2048].double().tril()
        wrong += float((found - expected).square().sum())
        norm += float(expected.square().sum())
    of_sums = float((sums - exact.sum(0)).norm() / exact.sum(0).norm())
    error = max((wrong / norm) ** 0.5, of_sums)
    return error if error == error else float("inf")


def _milliseconds(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a call, on the GPU's own clock where there is one."""
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _write(rows: Sequence[dict[str, Any]], name: str, largest: int, path: Path) -> None:
    """The best rows as the table of device `name`; those of the largest size serve any above."""
    entries = {
        (row["kernel"], row["dtype"], None if row["columns"] == largest else row["columns"]): row
        for row in rows
        if row["best"]
    }
    stamp = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    new = [
        Entry(
            kernel,
            dtype,
            limit,
            ProductConfig(**row["config"]),
            {**stamp, **{key: row[key] for key in ("columns", "tokens", "ms", "error")}},
        )
        for (kernel, dtype, limit), row in entries.items()
    ]
    kept = configs.read_table(path).entries if path.exists() else ()
    kept = tuple(e for e in kept if (e.kernel, e.dtype, e.max_columns) not in entries)
    table = Table((*new, *kept), device=name)
    lines = ",\n".join("    " + json.dumps(entry.to_json()) for entry in table.entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "device": {json.dumps(name)},\n  "entries": [\n{lines}\n  ]\n}}\n')
    configs.tables.cache_clear()

"""Timing that survives a shared machine: variants interleaved, medians with their spread.

Caches are as the last call left them, for every variant alike: nothing is flushed between calls.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from statistics import median
from typing import Any

import torch

from liar_ext.errors import InputError
from liar_ext.ops.precision import full_precision

# one sample lasts about this long: below it, launches and timers are what is measured
SAMPLE_SECONDS = 0.02
MOST_CALLS = 100
# a first call of this length is no start-up cost, and is not repeated to find out
LONG_SECONDS = 0.5

# side of the square product that measures the device's matmul rate, and bytes of the copy that
# measures its memory: well past the caches, and past 10 ms of work on either kind of device
CEILING_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}


def source_name(source: str) -> str:
    """What a result calls a model: the last part of a hub id, or of the whole path of a folder."""
    return os.path.basename(os.path.abspath(os.path.expanduser(source)))


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        InputError: `cuda` where torch sees no device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def interleave(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a call, one list of samples for each variant.

    Every round samples each variant once, so that a slow minute of the machine hits all of them.
    Calls before the first round are not timed; they tell how many calls make a sample. On a GPU the
    time is between two CUDA events around those calls.
    """
    calls = {}
    for name, call in variants.items():
        estimate = _sample(call, 1, device)
        if estimate < LONG_SECONDS:
            # the first call may have compiled or allocated
            estimate = _sample(call, 1, device)
        calls[name] = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(estimate, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            seconds[name].append(_sample(call, calls[name], device))
    return seconds


def _sample(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`p20`, `p50` and `p80`, to four significant digits: microseconds stand beside seconds."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), shares)
    names = ("p20", "p50", "p80")
    return {name: float(f"{q:.4g}") for name, q in zip(names, found.tolist(), strict=True)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    found = quantiles([1e3 * value for value in seconds])
    return {"ms": found["p50"], "p20_ms": found["p20"], "p80_ms": found["p80"]}


def rank_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """An interval for the median of what independent `values` are drawn from, whatever their
    distribution: from the k-th smallest to the k-th largest.

    Each value is below the median as often as not, so the interval misses it with probability
    `2 P(Binomial(n, 1/2) < k)`; k is the largest with which that is at most `1 - level`. Fewer than
    six values give no 95 %: then it is from the least to the most, and `coverage` says how much
    that is.

    Returns:
        `low`, `high`, `coverage`.
    """
    ordered, count = sorted(values), len(values)
    missed, kept = 0.0, 0
    for rank in range(1, (count + 1) // 2 + 1):
        # P(Binomial < rank), both sides
        chance = 2 * sum(comb(count, below) for below in range(rank)) / 2**count
        if rank > 1 and chance > 1 - level:
            break
        missed, kept = chance, rank
    return {"low": ordered[kept - 1], "high": ordered[-kept], "coverage": max(0.0, 1 - missed)}


def times_as_fast(seconds: list[float], baseline: list[float]) -> float:
    """Median over the rounds of the baseline's time over this one's, which were taken together."""
    return median(b / s for s, b in zip(seconds, baseline, strict=True))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that `call` had allocated at once, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def refuse_forcing() -> None:
    """A benchmark runs every variant there is, and a forced one would be all of them.

    Raises:
        InputError: the environment forces a backend or a kernel.
    """
    for name in ("LIAR_BACKEND", "LIAR_GRAM_KERNEL"):
        if os.environ.get(name):
            raise InputError(
                f"{name}={os.environ[name]}: this benchmark runs every version side by side; "
                "unset it, and use --backends to choose some"
            )


def matmul_rate(
    dtype: torch.dtype, device: torch.device, repeats: int = 5, side: int | None = None
) -> float:
    """FLOP/s of a large square product of random values: the ceiling of this run.

    Zeros would run faster, for a GPU lowers its clock by what the bits switch; float32 is IEEE.
    """
    if side is None:
        # float16 has no fast product on most processors: 2048³ took a quarter of a minute
        slow = device.type == "cpu" and dtype == torch.float16
        side = 512 if slow else CEILING_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with full_precision():
        seconds = interleave({"mm": lambda: a @ b}, repeats, device)["mm"]
    return 2.0 * side**3 * 1e3 / spread(seconds)["ms"]


def copy_rate(device: torch.device, repeats: int = 5, size: int | None = None) -> float:
    """Bytes/s of a large copy, read and written bytes both counted."""
    size = size or COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]
    return 2.0 * size * 1e3 / spread(seconds)["ms"]


@contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable for the time of the block; None leaves it unset."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def machine_state() -> dict[str, Any]:
    """What else was going on: the load of the processors, the clocks of the GPU if there is one."""
    state: dict[str, Any] = {"load_1min": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            state["gpu"] = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            state["gpu"] = f"nvidia-smi: {error}"
    return state

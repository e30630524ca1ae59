"""Timing that survives a shared machine: variants interleaved, medians with their spread."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleave(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call, one list for each variant.

    Every round runs each variant once, so that a slow minute of the machine hits all of them; one
    round before the first is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, call in variants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    p20, p50, p80 = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {
        "ms": round(p50.item(), 3),
        "p20_ms": round(p20.item(), 3),
        "p80_ms": round(p80.item(), 3),
    }


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

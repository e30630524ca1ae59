"""Where the time goes: seconds by phase, with the device drained before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("load", "forward", "gram", "solve", "write")


class Clock:
    """Adds up seconds for each of `PHASES`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            # kernels are queued: without this their time lands in whichever phase waits first
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] += time.perf_counter() - start

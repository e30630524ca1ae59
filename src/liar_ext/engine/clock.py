"""Where the time goes: seconds by phase, with the device drained before the clock is read.

And where the memory ran out: each phase has its own flag against that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from liar_ext.errors import OutOfMemory, is_out_of_memory

PHASES = ("load", "forward", "gram", "solve", "hold", "write")


class Clock:
    """Adds up seconds for each of `PHASES`.

    Attributes:
        hidden_states: where they wait, for what to do when there is no memory for more.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.hidden_states = "device"
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Raises OutOfMemory for what Python and torch raise when there is no memory left."""
        start = time.perf_counter()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"out of memory {self._advice(name)}") from error
        finally:
            # kernels are queued: without this their time lands in whichever phase waits first
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] += time.perf_counter() - start

    def _advice(self, phase: str) -> str:
        """In what memory ran out, and what needs less of it."""
        gpu = self._device.type == "cuda"
        places = {"device": ["host", "disk"] if gpu else ["disk"], "host": ["disk"]}
        elsewhere = " or ".join(places.get(self.hidden_states, []))
        if phase == "forward" or (phase == "hold" and not elsewhere):
            or_else = f", or give --hidden-states {elsewhere}" if elsewhere else ""
            return (
                "in the forward pass: a whole batch is in memory at once; lower --batch-size or "
                f"--seq-len{or_else}"
            )
        if phase == "hold":
            return f"where hidden states wait; give --hidden-states {elsewhere}"
        where = {
            "load": "reading a layer",
            "gram": "in the statistics of a layer",
            "solve": "in the repair of a layer",
            "write": "writing a layer",
        }[phase]
        ways = [f"--hidden-states {elsewhere}"] if elsewhere else []
        ways += ["--device cpu"] if gpu else []
        rest = f"give {' or '.join(ways)}" if ways else "it takes a machine with more memory"
        return f"{where}: that depends on the model's widths, not on --batch-size; {rest}"

"""Where the time goes, and where the memory ran out: each phase has its own flag against that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from liar_ext.errors import OutOfMemory, is_out_of_memory

PHASES = ("load", "forward", "backward", "gram", "solve", "hold", "write")
# on a GPU these are measured on the device
ON_DEVICE = ("forward", "backward", "gram", "solve", "hold")


class Clock:
    """Adds up seconds for each of `PHASES`.

    Kernels are queued. Draining the device at the end of each phase would leave it idle while the
    next one is prepared, five times for each batch and layer; so phases on a GPU are measured
    between two events in its stream, which are read when somebody asks for `seconds`.

    Attributes:
        hidden_states: where they wait, for what to do when there is no memory for more.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.hidden_states = "device"
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Raises OutOfMemory for what Python and torch raise when there is no memory left."""
        start = time.perf_counter()
        begin = self._event() if name in ON_DEVICE else None
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"out of memory {self._advice(name)}") from error
        finally:
            if begin is None:
                self._seconds[name] += time.perf_counter() - start
            elif (end := self._event()) is not None:
                self._open.append((name, begin, end))

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase so far; waits for the device."""
        for name, begin, end in self._open:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._open = []
        return self._seconds

    def _event(self) -> torch.cuda.Event | None:
        """Now, in the device's stream; None on a CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

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
        if phase == "backward":
            return (
                "in the gradient pass: a whole batch is in memory at once, with all that its "
                "backward pass needs; lower --batch-size or --seq-len"
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
        rest = f"give {', or '.join(ways)}" if ways else "it takes a machine with more memory"
        return f"{where}: that depends on the model's widths, not on --batch-size; {rest}"

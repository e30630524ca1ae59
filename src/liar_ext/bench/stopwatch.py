"""The time that the Sites of a model take while it runs, by hooks on its own modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from liar_ext.models import Site


class Stopwatch:
    """When each Site began and ended, forward by forward.

    A Site begins with its first producer and ends with its consumer: for attention that is
    everything from the projections of queries, keys and values to that of the output, the softmax
    and the key/value cache included; for an FFN the activation. Norms and the residual sum in front
    and behind, which no width changes, are not in it. On a GPU events are recorded there, and the
    time is what passes between them, waiting for the next launch included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: dict[int, Any] = {}
        self._laps: dict[int, list[tuple[Any, Any]]] = {}

    def now(self) -> Any:
        """Seconds, or an event that has been recorded."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds; on a GPU after a synchronisation."""
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def on(self, sites: Sequence[Site]) -> Iterator[None]:
        """Watch some Sites, by their place in the sequence."""
        with ExitStack() as stack:
            for place, site in enumerate(sites):
                for path in dict.fromkeys(p.path for p in site.spec.producers):
                    module = site.module.get_submodule(path)
                    handle = module.register_forward_pre_hook(self._begins(place))
                    stack.callback(handle.remove)
                handle = site.consumer.register_forward_hook(self._ends(place))
                stack.callback(handle.remove)
            yield

    def take(self) -> dict[int, list[float]]:
        """Seconds of every pass through every Site since the last time; waits for them."""
        self.wait()
        laps, self._laps = self._laps, {}
        return {
            place: [self.between(begin, end) for begin, end in own] for place, own in laps.items()
        }

    def _begins(self, place: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if place not in self._begun:
                self._begun[place] = self.now()

        return hook

    def _ends(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._laps.setdefault(place, []).append((self._begun.pop(place), self.now()))

        return hook

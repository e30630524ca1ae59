"""Capture once, replay only the consumer: layer forwards that pause at the Sites.

A layer's forward on one batch runs in a greenlet. When it reaches a Site's consumer it pauses and
hands over the consumer's input; after the Site was pruned it is resumed with the kept columns of
that same input and calls the new consumer. So every batch goes through every layer once, whatever
the architecture, and what comes after a Site sees the pruned Site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from liar_ext.calibration.batches import Batch
from liar_ext.models.site import Site


@dataclass
class LayerCall:
    """The arguments a model passes to one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Raised after the last layer's arguments are known: the rest of the model is not needed."""


def record_calls(
    backbone: nn.Module,
    layers: nn.ModuleList,
    batch: Batch,
    device: torch.device,
    options: dict[str, Any],
) -> tuple[Tensor, list[LayerCall]]:
    """Embed one batch and record how the model calls each of its layers, without running them.

    Every layer has its own arguments (masks and rotary tables differ by layer type), and they
    come from the model itself: no attention mask or position is built here. `options` are further
    arguments of the model (`use_cache=False` for decoders).

    Returns:
        the hidden states that enter layer 0 (b, t, d), and one call for each layer.
    """
    calls: list[LayerCall] = []
    first: list[Tensor] = []

    def stub(*args: Any, **kwargs: Any) -> Tensor:
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, args = args[0], args[1:]
        first.append(hidden)
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise _Stop
        return hidden

    # accelerate and others put a forward of their own on the instance: it is put back
    own = [vars(layer).get("forward") for layer in layers]
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device)
    try:
        for layer in layers:
            layer.forward = stub
        backbone(input_ids=batch.input_ids.to(device), attention_mask=mask, **options)
    except _Stop:
        pass
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return first[0], calls


class _Run(greenlet.greenlet):
    """A greenlet of this module, told apart from any other the caller may be running in."""


class LayerRun:
    """One layer's forward on one batch; pauses at every consumer in `pausing()`."""

    def __init__(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> None:
        def body() -> Tensor:
            output = layer(hidden, *call.args, **call.kwargs)
            return output[0] if isinstance(output, tuple) else output

        self._greenlet = _Run(body)
        self._resume: tuple[Any, ...] = ()

    def to_next(self) -> tuple[nn.Module | None, Tensor]:
        """Run to the next consumer: (consumer, its input), or (None, layer output) at the end."""
        value = self._greenlet.switch(*self._resume)
        if self._greenlet.dead:
            return None, value
        return value

    def close(self) -> None:
        """Unwind a run that is not needed to its end, which frees what its frames hold."""
        if not self._greenlet.dead:
            self._greenlet.throw()

    def keep(self, columns: Tensor | None) -> None:
        """The columns of its input that the paused consumer gets when the run goes on."""
        self._resume = (columns,)


@contextmanager
def pausing(sites: Sequence[Site]) -> Iterator[None]:
    """Make runs pause at these Sites' consumers; calls from outside a run are not affected."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # no local may name the current greenlet while it is paused: its own frame would then keep
        # it alive, and the garbage collector does not see into paused frames
        if not isinstance(greenlet.getcurrent(), _Run):
            return None
        columns = greenlet.getcurrent().parent.switch((module, args[0]))
        return args if columns is None else (args[0][..., columns], *args[1:])

    handles = [site.consumer.register_forward_pre_hook(hook) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

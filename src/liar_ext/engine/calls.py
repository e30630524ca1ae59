"""How a model calls its layers: recorded from the model itself, without running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch


class Encoded:
    """Stands among a layer's arguments for what the encoder made of its tokens."""


ENCODED = Encoded()


@dataclass
class LayerCall:
    """The arguments a model passes to one layer beside the hidden states.

    Of an encoder-decoder hidden states have both stacks' tokens, the encoder's first: a layer reads
    and writes those of its stack, and one of the decoder is given the others for `ENCODED`.

    Attributes:
        span: the layer's tokens, first and behind the last; None is all.
        ahead: what the tokens in front of the layer's go through first; they stay so.
        dtype: of what the model gives the layer for `ENCODED`; hidden states that are held together
            may be wider (T5 in float16, whose FFN ends in float32).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    span: tuple[int, int] | None = None
    ahead: nn.Module | None = None
    dtype: torch.dtype | None = None

    def own(self, states: Tensor) -> Tensor:
        """The layer's tokens of hidden states (b, t, d)."""
        return states if self.span is None else states[:, slice(*self.span)]

    def given(self, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with beside `own`."""
        if self.span is None or not self.span[0]:
            return self.args, self.kwargs
        encoded = states[:, : self.span[0]].to(self.dtype)

        def one(value: Any) -> Any:
            return encoded if value is ENCODED else value

        return tuple(map(one, self.args)), {name: one(v) for name, v in self.kwargs.items()}


class _Stop(Exception):
    """Raised after the last layer's arguments are known: the rest of the model is not needed."""


def record_calls(
    backbone: nn.Module,
    layers: Iterable[nn.Module],
    batch: Batch,
    device: torch.device,
    options: dict[str, Any],
    returns: int = 0,
    *,
    hands_on: bool = False,
) -> tuple[Tensor, list[LayerCall]]:
    """Embed one batch and record how the model calls each of its layers, without running them.

    Every layer has its own arguments (masks and rotary tables differ by layer type), and they
    come from the model itself: no attention mask or position is built here.

    Args:
        options: further arguments of the model (`use_cache=False` for decoders).
        returns, hands_on: see `Adapter`; with `hands_on` the first layer is run.
    Returns:
        the hidden states that enter layer 0 (b, t, d), and one call for each layer.
    """
    inputs = given(backbone, batch, device) | options
    return recorded(backbone, layers, inputs, returns, hands_on=hands_on)


def recorded(
    backbone: nn.Module,
    layers: Iterable[nn.Module],
    inputs: dict[str, Any],
    returns: int,
    *,
    hands_on: bool,
) -> tuple[Tensor, list[LayerCall]]:
    """`record_calls` with what the model is called with."""
    calls: list[LayerCall] = []
    first: list[Tensor] = []
    beside: tuple[Any, ...] = (None,) * (returns - 1)
    layers = list(layers)
    run = layers[0].forward

    def stub(*args: Any, **kwargs: Any) -> Any:
        nonlocal beside
        if hands_on and not calls:
            beside = run(*args, **kwargs)[1:]
        if "hidden_states" in kwargs:
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, args = args[0], args[1:]
        first.append(hidden)
        calls.append(LayerCall(args, kwargs))
        if len(calls) == len(layers):
            raise _Stop
        return (hidden, *beside) if returns else hidden

    with _replaced(layers, stub), suppress(_Stop):
        backbone(**inputs)
    return first[0], calls


def last_hidden(
    backbone: nn.Module,
    layers: Iterable[nn.Module],
    batch: Batch,
    device: torch.device,
    options: dict[str, Any],
    final: Tensor,
    returns: int = 0,
) -> Tensor:
    """What the model makes of the output of its last layer, by its own code: its final norm.

    Args:
        final: (b, t, d), for the batch; the other arguments are those of `record_calls`.
    """
    return left(backbone, layers, given(backbone, batch, device) | options, final, returns)


def left(
    backbone: nn.Module,
    layers: Iterable[nn.Module],
    inputs: dict[str, Any],
    final: Tensor,
    returns: int,
) -> Tensor:
    """`last_hidden` with what the model is called with."""
    calls, layers = 0, list(layers)

    def stub(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        passed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        states = final if calls == len(layers) else passed
        return (states, *[None] * (returns - 1)) if returns else states

    with _replaced(layers, stub):
        found = backbone(**inputs)
    return found[0]


def given(backbone: nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
    """What a model is called with for a batch; features in the dtype of what reads them, which is
    the first that it has."""
    return batch.given(device, next(backbone.parameters()).dtype)


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Layers that do something else when they are called."""
    # accelerate and others put a forward of their own on the instance: it is put back
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before


def shared(calls: list[LayerCall], known: dict[tuple[Any, ...], list[Tensor]]) -> list[LayerCall]:
    """The same calls, with tensors that another batch has already replaced by that one's.

    Rotary tables and masks of full windows are the same in every batch; held once, they do not
    grow with the number of batches.

    Args:
        known: tensors by shape, dtype and device; what is new is added.
    """

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (tuple(value.shape), value.dtype, value.device)
            like = known.setdefault(key, [])
            for other in like:
                if other is value or torch.equal(other, value):
                    return other
            like.append(value)
            return value
        if type(value) in (tuple, list):
            return type(value)(one(entry) for entry in value)
        return value

    return [
        replace(
            call,
            args=one(call.args),
            kwargs={name: one(value) for name, value in call.kwargs.items()},
        )
        for call in calls
    ]


def layer_output(layer: nn.Module, states: Tensor, call: LayerCall) -> Tensor:
    """What a layer makes of the hidden states that enter it."""
    if call.ahead is not None:
        assert call.span is not None, "there is something in front"
        ready = call.ahead(states[:, : call.span[0]])
        states = torch.cat((ready, states[:, call.span[0] :]), 1)
    args, kwargs = call.given(states)
    output = layer(call.own(states), *args, **kwargs)
    output = output[0] if isinstance(output, tuple | list) else output
    if call.span is None:
        return output
    first, last = call.span
    return torch.cat((states[:, :first], output, states[:, last:]), 1)

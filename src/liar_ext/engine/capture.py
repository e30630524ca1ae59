"""Capture once, replay only the consumer: layer forwards that pause at the Sites.

A layer's forward on one batch runs in a greenlet. When it reaches a Site's consumer it pauses and
hands over the consumer's input; after the Site was pruned it is resumed with the kept columns of
that same input and calls the new consumer. So every batch goes through every layer once, whatever
the architecture, and what comes after a Site sees the pruned Site.

A paused forward keeps tensors of its batch alive. On a shelf that moves them (`LayerRun.shelve`),
their storages are emptied and filled again before the run goes on, as FSDP does with parameters:
then only one batch at a time is in the device's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from liar_ext.calibration.batch import Batch
from liar_ext.engine.shelf import Item, Shelf
from liar_ext.models import linear
from liar_ext.models.site import Site

# smaller tensors stay: rotary tables and the like, which batches may share
SHELVED_BYTES = 1 << 18


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
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    span: tuple[int, int] | None = None
    ahead: nn.Module | None = None

    def own(self, states: Tensor) -> Tensor:
        """The layer's tokens of hidden states (b, t, d)."""
        return states if self.span is None else states[:, slice(*self.span)]

    def given(self, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer is called with beside `own`."""
        if self.span is None or not self.span[0]:
            return self.args, self.kwargs
        encoded = states[:, : self.span[0]]

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


@contextmanager
def listening(sites: Sequence[Site], *, runs_only: bool = False) -> Iterator[dict[str, Tensor]]:
    """The outputs of these Sites' consumers, by kind, once a forward has passed them.

    Copies: what follows may write to an output. With `runs_only` those of a `LayerRun`: calls from
    outside are not heard.
    """
    heard: dict[str, Tensor] = {}

    def listen(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not runs_only or isinstance(greenlet.getcurrent(), _Run):
                heard[site.kind] = output.clone()

        return hook

    handles = [site.consumer.register_forward_hook(listen(site)) for site in sites]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class _Run(greenlet.greenlet):
    """A greenlet of this module, told apart from any other the caller may be running in."""


class LayerRun:
    """One layer's forward on one batch; pauses at every consumer in `pausing()`."""

    def __init__(self, layer: nn.Module, hidden: Item, call: LayerCall, shelf: Shelf) -> None:
        self._layer, self._hidden, self._call, self._shelf = layer, hidden, call, shelf
        self._greenlet: _Run | None = None
        self._made = _Made()
        self._input: Tensor | None = None
        self._version = 0
        self._away: list[tuple[torch.UntypedStorage, int, Item]] = []
        self._resume: tuple[Any, ...] = ()
        self._paused: tuple[nn.Module, Tensor] | None = None

    def to_next(self) -> tuple[nn.Module | None, Tensor]:
        """Run to the next consumer: (consumer, its input), or (None, layer output) at the end."""
        if self._greenlet is None:
            self._start()
        self._return()
        assert self._greenlet is not None
        self._paused = None
        if self._shelf.moves:
            with self._made:
                value = self._greenlet.switch(*self._resume)
        else:
            value = self._greenlet.switch(*self._resume)
        if self._greenlet.dead:
            self._input = None
            return None, value
        self._paused = value
        return value

    def again(self) -> Tensor:
        """The consumer's input once more, while the run is paused there."""
        assert self._paused is not None
        self._return()
        return self._paused[1]

    def shelve(self) -> None:
        """Take what the paused forward holds out of the device's memory, if the shelf does that."""
        if not self._shelf.moves or self._greenlet is None or self._away:
            return
        stays = {_place(t) for t in (*self._layer.parameters(), *self._layer.buffers())}
        stays |= {_place(t) for t in tree_flatten((self._call.args, self._call.kwargs))[0]}
        if self._input is not None and self._input._version != self._version:
            self._input = None  # written to: what is on the shelf is not it any more
        if self._input is not None:
            # its bytes are on the shelf already
            stays.add(_place(self._input))
            self._input.untyped_storage().resize_(0)
        for storage in self._made.storages(stays):
            self._away.append((storage, storage.nbytes(), self._shelf.put(_whole(storage))))
            storage.resize_(0)

    def keep(self, columns: Tensor | None) -> None:
        """The columns of its input that the paused consumer gets when the run goes on."""
        self._resume = (columns,)

    def close(self) -> None:
        """Unwind a run that is not needed to its end, which frees what its frames hold."""
        if self._greenlet is not None and not self._greenlet.dead:
            self._greenlet.throw()
        for _, _, item in self._away:
            item.free()
        self._away, self._input, self._paused = [], None, None

    def _start(self) -> None:
        layer, call = self._layer, self._call
        hidden = self._hidden.fetch()
        if self._shelf.moves:
            self._input, self._version = hidden, hidden._version

        self._greenlet = _Run(lambda states: layer_output(layer, states, call))
        self._resume = (hidden,)

    def _return(self) -> None:
        """Bring back what was shelved."""
        if self._input is not None and self._input.untyped_storage().nbytes() == 0:
            storage = self._input.untyped_storage()
            storage.resize_(self._input.numel() * self._input.element_size())
            self._hidden.refill(self._input)
            self._version = self._input._version
        for storage, size, item in self._away:
            storage.resize_(size)
            item.refill(_whole(storage))
            item.free()
        self._away = []


class _Made(TorchDispatchMode):
    """Remembers, weakly, the large tensors that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= SHELVED_BYTES:
                self._seen.append(weakref.ref(value))
        return out

    def storages(self, stays: set[int]) -> list[torch.UntypedStorage]:
        """The storages of those that are still alive, each once, but for those at `stays`."""
        alive = [tensor for seen in self._seen if (tensor := seen()) is not None]
        self._seen = [weakref.ref(tensor) for tensor in alive]
        found = {}
        for tensor in alive:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable() and _place(tensor) not in stays:
                found[storage.data_ptr()] = storage
        return list(found.values())


def _place(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextmanager
def pausing(sites: Sequence[Site]) -> Iterator[None]:
    """Make runs pause at these Sites' consumers; calls from outside a run are not affected."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # no local may name the current greenlet while it is paused: its own frame would then keep
        # it alive, and the garbage collector does not see into paused frames
        if not isinstance(greenlet.getcurrent(), _Run):
            return None
        columns = greenlet.getcurrent().parent.switch((module, args[0]))
        if columns is None:
            return args
        # `Conv1D` cannot make rows of no columns; this one has left its layer already
        fed = linear.fed(module, args[0][..., columns])
        return (fed, *args[1:])

    handles = [site.consumer.register_forward_pre_hook(hook) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

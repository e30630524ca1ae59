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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from liar_ext.engine.calls import LayerCall, layer_output
from liar_ext.engine.shelf import Item, Shelf
from liar_ext.models import linear
from liar_ext.models.site import Site

# smaller tensors stay: rotary tables and the like, which batches may share
SHELVED_BYTES = 1 << 18


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

"""Trials: how alike a model with merged layers is to the original, by running what differs.

The original runs once. What entered each layer that may become a base is kept, and a trial runs
from its base on: below, nothing differs. Nothing is copied of a model but the weights of merged
layers, and arguments of layers are those that the model itself has passed (`engine.capture`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.depth.collapse import State
from liar_ext.depth.mixture import Mixture, Source, mixed
from liar_ext.depth.rules import norm_names
from liar_ext.depth.similarity import similarities
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.engine.stream import Stream
from liar_ext.errors import InputError
from liar_ext.models.twin import twin

_States = dict[int, Item]


@dataclass
class Evaluations:
    """Layers that all texts went through.

    Attributes:
        done: in the original, once, and from its base on in each merged model.
        whole: the same if merged models ran whole.
        published: if the original ran again beside each of them, as the published code has it.
    """

    done: int = 0
    whole: int = 0
    published: int = 0


@dataclass
class Trials:
    """Answers `collapse`.

    Attributes:
        source: the layers that merged ones are made of.
        kind: of similarity.
        keeps: whether merged layers stay in memory while a model has them, or are made each time.
    """

    runtime: Runtime
    batches: Sequence[Batch]
    source: Source
    kind: str
    keeps: bool
    evaluations: Evaluations = field(default_factory=Evaluations)
    _entering: dict[int, _States] = field(init=False, default_factory=dict)
    _wanted: _States = field(init=False, default_factory=dict)
    _made: dict[Mixture, nn.Module] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._stream: Stream = self.runtime.stream(self.batches)

    @torch.no_grad()
    def begin(self, bases: Sequence[int]) -> None:
        """Run the original, and keep what enters the layers that may become bases.

        Raises:
            InputError: weights, or the original's last hidden states, are not finite.
        """
        stream, runtime = self._stream, self.runtime
        runtime.embed(stream)
        for index in range(len(runtime.layers)):
            runtime.open(index)
            later = self._through(index, stream.hidden)
            runtime.close(index)
            if index in bases:
                self._entering[index] = stream.hidden
            else:
                free_all(stream.hidden)
            stream.hidden = later
        final, stream.hidden = stream.hidden, {}
        self.evaluations.whole += len(runtime.layers)
        # stays open: every trial ends with the final norm
        with runtime.clock.phase("load"):
            runtime.store.open_outside()
        for number in stream.batches:
            state = self._last(number, final[number])
            valid = stream.batch(number).attention_mask.to(state.device)
            if not bool(torch.isfinite(state[valid]).all()):
                raise InputError(
                    "the model's own last hidden states are not finite; the weights or the dtype "
                    "are broken: try --dtype float32"
                )
            with runtime.clock.phase("hold"):
                self._wanted[number] = runtime.shelf.put(state)
        free_all(final)

    @torch.no_grad()
    def similarity(self, state: State, first: int) -> float:
        """Mean over all texts; NaN where a merged model's states are not finite.

        Args:
            state: the layers; first: below it they are those of the original.
        """
        self._made = {key: layer for key, layer in self._made.items() if key in state}
        self.runtime.store.expect(mixture.base for mixture in state[first:])
        entering = states = self._entering[first]
        for mixture in state[first:]:
            with self._in_place(mixture):
                later = self._through(mixture.base, states)
            if states is not entering:
                free_all(states)
            states = later
        self._stream.hidden = {}
        self.evaluations.whole += len(state)
        self.evaluations.published += len(self.runtime.layers) + len(state)
        found = [self._compared(number, states[number]) for number in self._stream.batches]
        free_all(states)
        return float(torch.cat(found).mean())

    def made(self, mixture: Mixture) -> nn.Module:
        """A merged layer over tensors of its own; its base is open."""
        if mixture in self._made:
            return self._made[mixture]
        layer = twin(self.runtime.layers[mixture.base])
        norms = norm_names(layer)
        with self.runtime.clock.phase("load"):
            for name, parameter in list(layer.named_parameters()):
                terms = mixture.terms(name, norms)
                if terms == Mixture.of(mixture.base).weights:
                    continue
                # rounded as in the file, then to what is computed in
                pieces = [
                    piece.to(parameter.device, parameter.dtype)
                    for piece in mixed(self.source, mixture, terms, name)
                ]
                value = torch.cat(pieces).view(parameter.shape)
                del pieces
                path, _, leaf = name.rpartition(".")
                own = nn.Parameter(value, requires_grad=parameter.requires_grad)
                setattr(layer.get_submodule(path), leaf, own)
        if self.keeps:
            self._made[mixture] = layer
        return layer

    def free(self) -> None:
        """Let go of what waits on the shelf and of what is open."""
        for states in (*self._entering.values(), self._wanted):
            free_all(states)
        self._entering, self._wanted, self._made = {}, {}, {}
        self.runtime.store.close_outside()

    @contextmanager
    def _in_place(self, mixture: Mixture) -> Iterator[None]:
        """The layer of a mixture stands where its base does in the original."""
        index, layers = mixture.base, self.runtime.layers
        self.runtime.open_again(index)
        dense = layers[index]
        try:
            if not mixture.plain:
                layers[index] = self.made(mixture)
            yield
        finally:
            layers[index] = dense
            self.runtime.close(index)

    def _through(self, index: int, states: _States) -> _States:
        self.evaluations.done += 1
        self._stream.hidden = states
        return self._stream.through(index, (), onward=True)

    def _last(self, number: int, final: Item) -> Tensor:
        """The model's output for what its last layer gives, (b, t, d): behind the final norm."""
        with self.runtime.clock.phase("forward"):
            return self.runtime.last_hidden(self._stream.batch(number), final.fetch())

    def _compared(self, number: int, final: Item) -> Tensor:
        found, wanted = self._last(number, final), self._wanted[number].fetch()
        mask = self._stream.batch(number).attention_mask.to(found.device)
        with self.runtime.clock.phase("forward"):
            return similarities(self.kind, wanted, found, mask).cpu()

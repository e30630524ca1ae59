"""The calibration batches on their way through the layers, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import LayerCall, shared
from liar_ext.engine.capture import LayerRun, pausing
from liar_ext.engine.clock import Clock
from liar_ext.engine.passage import Passage
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.shelf import Item, Shelf
from liar_ext.engine.statistics import segments
from liar_ext.models import Site, SiteSpec
from liar_ext.models.chain import Chain


class Accumulator(Protocol):
    """What takes the inputs of a Site's consumer, batch by batch in order.

    `valid`: see `Batch.valid_on`.
    """

    def add(self, x: Tensor, valid: Tensor | None, segment: int) -> None: ...


class Comparison(Protocol):
    """What takes the hidden states that enter a layer and leave it, batch by batch in order."""

    def add(self, before: Tensor, after: Tensor, valid: Tensor | None, segment: int) -> None: ...


# hands the inputs of a Site, of all batches of this rank, to an accumulator; may be called again
Feed = Callable[[Accumulator], None]
# a Site and its feed -> the columns the forward goes on with, or None for all
Visit = Callable[[Site, Feed], Tensor | None]


class Stream:
    """Hidden states of this rank's batches, and how the model calls its layers on them.

    A rank has whole segments (`statistics.segments`), so that sums do not depend on how many ranks
    there are.

    Attributes:
        hidden: what enters the next layer, by the number of the batch; on the shelf.
        entered: what entered the layer before, where it `keeps` that; it then outlives `advance`.
        total: batches of all ranks.
        count: segments of all batches, `least` where there are so many batches. alone: it is 1.

    Args:
        specs: all Sites of a layer, targeted or not, in the order of a forward.
        scale: see `Adapter`.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        layers: Chain,
        *,
        device: torch.device,
        shelf: Shelf,
        ranks: Ranks,
        clock: Clock,
        least: int = 1,
        specs: Sequence[SiteSpec] = (),
        scale: float = 1.0,
    ) -> None:
        self._specs, self._scale = specs, scale
        self._layers, self._device, self._shelf, self._clock = layers, device, shelf, clock
        self._segments = segments(batches, least)
        self.count = count = self._segments[-1] + 1 if self._segments else 0
        mine = ranks.share(count)
        self._batches = {
            i: batch
            for i, (batch, segment) in enumerate(zip(batches, self._segments, strict=True))
            if segment in mine
        }
        self.alone = count <= 1
        self.total = len(batches)
        self.hidden: dict[int, Item] = {}
        self.entered: dict[int, Item] = {}
        self.keeps = False
        self._calls: dict[int, list[LayerCall]] = {}
        self._valid: dict[tuple[int, tuple[int, int] | None], Tensor | None] = {}

    @property
    def batches(self) -> list[int]:
        """The numbers of this rank's batches."""
        return list(self._batches)

    def batch(self, number: int) -> Batch:
        return self._batches[number]

    def call(self, number: int, index: int) -> LayerCall:
        """How the model calls a layer on a batch."""
        return self._calls[number][index]

    def valid(self, number: int, index: int) -> Tensor | None:
        """Where valid tokens are in a batch (`Batch.valid_on`), of those that a layer reads."""
        return self._valid[number, self._calls[number][index].span]

    def own(self, number: int, index: int, states: Tensor) -> Tensor:
        """The tokens that a layer reads, of a batch's hidden states."""
        return self._calls[number][index].own(states)

    def segment(self, number: int) -> int:
        """The segment that a batch is in (`statistics.segments`)."""
        return self._segments[number]

    def embed(self, passage: Passage) -> None:
        """Enter the first layer: embeddings, and every layer's own arguments (`record_calls`)."""
        known: dict[tuple[Any, ...], list[Tensor]] = {}
        for number, batch in self._batches.items():
            with self._clock.phase("forward"):
                states, calls = passage.enter(batch, self._device)
                self._calls[number] = shared(calls, known)
            with self._clock.phase("hold"):
                self.hidden[number] = self._shelf.put(states)
            parts = dict(zip(dict.fromkeys(call.span for call in calls), batch.parts, strict=True))
            for span, part in parts.items():
                self._valid[number, span] = part.valid_on(self._device)

    def advance(self, later: Mapping[int, Item]) -> None:
        """Replace the hidden states; the old ones are freed, or become those that `entered`."""
        gone = [self.entered] if self.keeps else [self.entered, self.hidden]
        for states in gone:
            for number, item in states.items():
                if later.get(number) is not item:
                    item.free()
        self.entered = self.hidden if self.keeps else {}
        self.hidden = dict(later)

    def kept(self) -> dict[str, Item]:
        """All hidden states, by a name for `shelve`: the number of the batch, and after a dash
        the path where there are several."""
        return {str(number): item for number, item in self.hidden.items()}

    def shelve(self, states: Iterable[tuple[str, Tensor]]) -> None:
        """Hidden states from elsewhere (a snapshot) take the place of the present ones."""
        self.advance({int(name): self._shelf.put(tensor) for name, tensor in states})

    def through(
        self,
        index: int,
        taps: Sequence[tuple[Site, Accumulator]],
        *,
        onward: bool,
        compared: Comparison | None = None,
    ) -> dict[int, Item]:
        """One forward of each batch through a layer as it is; nothing of a batch is held.

        Args:
            taps: Sites and what takes their inputs.
            onward: whether the outputs are wanted.
            compared: what takes the hidden states on both sides of the layer.
        Returns:
            the outputs; hidden states stay what they were until `advance`.
        """
        later: dict[int, Item] = {}
        with pausing([site for site, _ in taps]):
            for number, run in self._runs(index).items():
                try:
                    for site, accumulator in taps:
                        with self._clock.phase("forward"):
                            x = _expect(run.to_next(), site)
                        with self._clock.phase("gram"):
                            accumulator.add(x, self.valid(number, index), self._segments[number])
                        run.keep(None)
                        del x
                    if onward or compared is not None:
                        with self._clock.phase("forward"):
                            states = run.to_next()[1]
                        if compared is not None:
                            self._compare(index, number, states, compared)
                        if onward:
                            with self._clock.phase("hold"):
                                later[number] = self._shelf.put(states)
                        del states
                finally:
                    run.close()
        return later

    def _compare(self, index: int, number: int, after: Tensor, compared: Comparison) -> None:
        with self._clock.phase("hold"):
            before = self.hidden[number].fetch()
        with self._clock.phase("gram"):
            compared.add(
                self.own(number, index, before),
                self.own(number, index, after),
                self.valid(number, index),
                self._segments[number],
            )

    def stopping(self, index: int, sites: Sequence[Site], visit: Visit, *, onward: bool) -> None:
        """Each batch stops at each Site until all have been there and `visit` has acted on it.

        Forwards that stand at a Site wait on the shelf. Afterwards the hidden states are the
        layer's outputs, or there are none where nobody wants them (`onward`).
        """
        runs = self._runs(index)
        try:
            with pausing(sites):
                for site in sites:
                    columns = visit(site, self._feed(site, runs))
                    for run in runs.values():
                        run.keep(columns)
                for number, run in runs.items():
                    if onward:
                        with self._clock.phase("forward"):
                            states = run.to_next()[1]
                        with self._clock.phase("hold"):
                            later = self._shelf.put(states)
                            del states
                            self.hidden[number].free()
                            self.hidden[number] = later
        finally:
            for run in runs.values():
                run.close()
        if not onward:
            self.advance({})

    def _feed(self, site: Site, runs: Mapping[int, LayerRun]) -> Feed:
        arrived: set[int] = set()

        def feed(accumulator: Accumulator) -> None:
            for number, run in runs.items():
                with self._clock.phase("forward"):
                    x = run.again() if number in arrived else _expect(run.to_next(), site)
                    arrived.add(number)
                self._hand(accumulator, site, number, x)
                del x
                with self._clock.phase("hold"):
                    run.shelve()

        return feed

    def _hand(self, accumulator: Accumulator, site: Site, number: int, x: Tensor) -> None:
        with self._clock.phase("gram"):
            accumulator.add(x, self.valid(number, site.layer), self._segments[number])

    def _runs(self, index: int) -> dict[int, LayerRun]:
        layer = self._layers[index]
        return {
            number: LayerRun(layer, self.hidden[number], self._calls[number][index], self._shelf)
            for number in self._batches
        }


def _expect(reached: tuple[torch.nn.Module | None, Tensor], site: Site) -> Tensor:
    module, x = reached
    if module is not site.consumer:
        raise RuntimeError(f"the forward pass reached another module before {site.name}")
    return x

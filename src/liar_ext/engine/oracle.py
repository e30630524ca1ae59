"""ModelOracle: whole models of given widths, put together layer by layer and compared with the
dense one.

All candidates of a call go through the layers together: a layer is read once, and candidates that
are the same up to there share their hidden states. Nothing but one layer, one batch and what waits
on the shelf is in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from liar_ext.allocation.search import TOGETHER, Candidate
from liar_ext.calibration.batch import Batch, first_samples
from liar_ext.engine.ledger import SearchLedger
from liar_ext.engine.level_store import Key, Levels
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import Item, free_all
from liar_ext.engine.statistics import valid_rows
from liar_ext.engine.stream import Stream
from liar_ext.models.twin import twin
from liar_ext.ops.divergence import distances, divergence

# kept units of the Sites of each layer up to one: models that are the same so far
_Prefix = tuple[Candidate, ...]
_States = dict[int, Item]


def together(count: int, windows: int) -> int:
    """Candidates that go through the layers at once, on some of `count` windows."""
    return max(1, TOGETHER * count // windows)


@dataclass
class ModelOracle:
    """Answers a search (`allocation.search.Oracle`).

    Attributes:
        windows: what models are compared on; every rank has all, and runs its share.
        sites: the targeted Sites in the order of a candidate, with their dense units.
        levels: of every Site, all that are asked for but the dense ones.
        ledger: what is known already.
        prepare: makes the levels; called before the first candidate that is not known.
    """

    runtime: Runtime
    windows: Sequence[Batch]
    sites: Sequence[tuple[Key, int]]
    levels: Levels
    ledger: SearchLedger
    prepare: Callable[[], None]
    _streams: dict[int, tuple[Stream, _States, _States]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._first = min((layer for (layer, _), _ in self.sites), default=0)
        self._count = sum(len(batch.input_ids) for batch in self.windows)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Candidate], share: float = 1.0) -> list[float]:
        """KL divergence from the dense model's next token, mean over the tokens; of models without
        a language-model head the relative squared error of the last hidden state.

        Args:
            share: of the windows, rounded up.
        """
        windows = min(self._count, max(1, math.ceil(share * self._count - 1e-9)))
        fresh = [c for c in dict.fromkeys(candidates) if self.ledger.get(c, windows) is None]
        most = together(self._count, windows)
        for start in range(0, len(fresh), most):
            asked = fresh[start : start + most]
            self.prepare()
            losses = self._assembled(asked, windows)
            before = self.ledger.best(self._count), int(self.ledger.spent(self._count))
            self.ledger.add(asked, windows, losses)
            self._tell(*before)
        found = (self.ledger.get(candidate, windows) for candidate in candidates)
        return [loss for loss in found if loss is not None]

    def _tell(self, best: float, spent: int) -> None:
        """Progress since the best loss and the candidates spent were these."""
        now = int(self.ledger.spent(self._count))
        for step in range(spent, now):
            self.runtime.progress.layer(step)
        if (loss := self.ledger.best(self._count)) < best:
            self.runtime.progress.tell(f"search: {now} models tried, loss {loss:.5g}")

    def _assembled(self, candidates: Sequence[Candidate], windows: int) -> list[float]:
        stream, entering, dense = self._stream(windows)
        states: dict[_Prefix, _States] = {(): entering}
        split = [self._by_layer(candidate) for candidate in candidates]
        for index in range(self._first, len(self.runtime.layers)):
            self.runtime.open(index)
            later: dict[_Prefix, _States] = {}
            # all models with the same widths here, one after the other: a level is read once
            following = dict.fromkeys(own[: index - self._first + 1] for own in split)
            left = Counter(prefix[:-1] for prefix in following)
            for units in dict.fromkeys(prefix[-1] for prefix in following):
                with self._shrunk(index, units):
                    for prefix in (p for p in following if p[-1] == units):
                        before = prefix[:-1]
                        stream.hidden = states[before]
                        later[prefix] = stream.through(index, (), onward=True)
                        left[before] -= 1
                        if not left[before] and states[before] is not entering:
                            free_all(states[before])
            stream.hidden = {}
            self.runtime.close(index)
            states = later
        found = self._compared(stream, dense, states)
        return [found[own] for own in split]

    def _by_layer(self, candidate: Candidate) -> _Prefix:
        """Kept units of the Sites of each layer from the first targeted one on."""
        layers: list[list[int]] = [[] for _ in range(self._first, len(self.runtime.layers))]
        for ((layer, _), _), units in zip(self.sites, candidate, strict=True):
            layers[layer - self._first].append(units)
        return tuple(map(tuple, layers))

    @contextmanager
    def _shrunk(self, index: int, units: Candidate) -> Iterator[None]:
        """A layer with these widths in the place of the dense one."""
        dense = self.runtime.layers[index]
        self.runtime.layers[index] = twin(dense)
        try:
            own = [(key[1], whole) for key, whole in self.sites if key[0] == index]
            for (kind, whole), kept in zip(own, units, strict=True):
                if kept == whole:
                    continue
                (site,) = self.runtime.sites(index, (kind,))
                with self.runtime.clock.phase("load"):
                    level = self.levels.load((index, kind), kept, self.runtime.device)
                site.shrink(level.keep, level.weight, level.bias)
            yield
        finally:
            self.runtime.layers[index] = dense

    def _stream(self, windows: int) -> tuple[Stream, _States, _States]:
        """The first windows: their calls, what enters the first targeted layer, and the dense
        model's last hidden states. The dense model is run once for each number of windows."""
        if windows not in self._streams:
            batches = first_samples(self.windows, windows)
            # a rank has whole segments: as many as there are batches
            stream = self.runtime.stream(batches, least=len(batches))
            self.runtime.embed(stream)
            entering = stream.hidden
            for index in range(len(self.runtime.layers)):
                self.runtime.open(index)
                later = stream.through(index, (), onward=True)
                self.runtime.close(index)
                if index < self._first:
                    free_all(stream.hidden)
                    entering = later
                elif stream.hidden is not entering:
                    free_all(stream.hidden)
                stream.hidden = later
            final, stream.hidden = stream.hidden, {}
            self._streams[windows] = stream, entering, final
        return self._streams[windows]

    def _compared(
        self, stream: Stream, dense: _States, states: dict[_Prefix, _States]
    ) -> dict[_Prefix, float]:
        """The loss of each; what they left behind is freed."""
        found: dict[_Prefix, float] = {}
        with self.runtime.head() as module:
            head = module if self.runtime.predicts else None
            for prefix, own in states.items():
                sums = {n: self._batch(stream, n, dense[n], own[n], head) for n in own}
                # in the order of the batches, whichever rank had them
                every = {n: s for part in self.runtime.ranks.gather(sums) for n, s in part.items()}
                above = sum(every[n][0] for n in sorted(every))
                below = sum(every[n][1] for n in sorted(every))
                found[prefix] = above / below if math.isfinite(above) else math.inf
                free_all(own)
        return found

    def _batch(
        self, stream: Stream, number: int, dense: Item, pruned: Item, head: nn.Module | None
    ) -> tuple[float, float]:
        """Sum of a batch's losses, and what it is divided by in the end."""
        batch = stream.batch(number)
        valid = stream.valid(number, len(self.runtime.layers) - 1)
        wanted, found = (self._last(batch, item, valid) for item in (dense, pruned))
        with self.runtime.clock.phase("forward"):
            if head is None:
                above, below = distances(wanted, found)
                return float(above), float(below)
            return float(divergence(head, wanted, found)), float(len(wanted))

    def _last(self, batch: Batch, item: Item, valid: Tensor | None) -> Tensor:
        """The backbone's output at the valid tokens, (tokens, d)."""
        with self.runtime.clock.phase("forward"):
            return valid_rows(self.runtime.last_hidden(batch, item.fetch()), valid)

    def free(self) -> None:
        """Let go of what waits on the shelf."""
        for _, entering, dense in self._streams.values():
            for states in (entering, dense):
                free_all(states)
        self._streams = {}

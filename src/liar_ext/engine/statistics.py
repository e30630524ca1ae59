"""Statistics of one Site over all calibration batches, the same on any number of ranks.

float32 sums depend on their order, and a solve magnifies that by its condition. So the batches are
cut into segments that depend on the calibration tokens alone; a segment is summed in float32 by one
rank, in order; segments are added in float64, where order does not show; the result is rounded to
float32 once. That also keeps long sums from drifting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.engine.ranks import Ranks
from liar_ext.ops.cosine import row_cosines
from liar_ext.ops.cross import cross
from liar_ext.ops.drift import Drift, Sample
from liar_ext.ops.gram import gram
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.recipe import Recipe

# tokens of a Gram call at least, where there are so many: each call reads and writes all of G and
# is one more launch; for 1536 columns on one core, 300 tokens a call took 17 % longer than 1000
CHUNK_TOKENS = 4096
# enough for 64 ranks; closing a segment reads and writes the triangle once more
MOST_SEGMENTS = 64
# one segment of so many is held out where a ridge is chosen: 20 % of the tokens
HELD_OUT = 5
# rows of G that are added or rounded at a time
_ROWS = 1024


def segments(batches: Sequence[Batch], least: int = 1) -> list[int]:
    """The segment of each batch: never falling, about equal tokens, `CHUNK_TOKENS` each or more.

    Of less where else there were not `least` of them; a batch is in one segment.
    """
    tokens = [batch.tokens for batch in batches]
    total = sum(tokens)
    count = max(1, min(MOST_SEGMENTS, max(total // CHUNK_TOKENS, least), len(tokens)))
    found, before = [], 0
    for own in tokens:
        # where the middle of the batch lies
        found.append(min((2 * before + own) * count // max(2 * total, 1), count - 1))
        before += own
    # numbered without gaps, so that ranks can share them evenly
    names = {name: position for position, name in enumerate(dict.fromkeys(found))}
    return [names[name] for name in found]


def least_segments(recipe: Recipe) -> int:
    """How many there should be under a recipe: enough to hold one out where it chooses a ridge."""
    return HELD_OUT if recipe.chooses_ridge else 1


def held_out(count: int) -> frozenset[int]:
    """Which of `count` segments are held out: one of `HELD_OUT`, or of all if there are fewer."""
    every = min(HELD_OUT, count)
    return frozenset(range(every // 2, count, every)) if count > 1 else frozenset()


def held_out_tokens(batches: Sequence[Batch], recipe: Recipe) -> int:
    """Valid tokens that are held out under a recipe."""
    if not recipe.chooses_ridge:
        return 0
    numbers = segments(batches, least_segments(recipe))
    chosen = held_out(numbers[-1] + 1) if numbers else frozenset()
    pairs = zip(batches, numbers, strict=True)
    return sum(batch.tokens for batch, number in pairs if number in chosen)


def valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """The rows of `x` (..., n) at positions `valid` (`Batch.valid_on`), all for None, (·, n)."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if valid is None else rows.index_select(0, valid)


class SiteMoments:
    """Accumulates the Moments of one Site, batch by batch in the order of the batches.

    Args:
        dtype: float32, or float64 where centring would lose float32 sums.
        alone: all batches are one segment, so that there is nothing to add up in float64.
        held_out: segments whose Moments are wanted on their own, too.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        dtype: torch.dtype,
        alone: bool,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        self._part = Moments.zeros(columns, dtype=dtype, device=device)
        self._whole: Tensor | None = None
        self._held: Moments | None = None
        if held_out or (not alone and dtype != torch.float64):
            self._whole = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        if held_out:
            self._held = Moments.zeros(columns, dtype=torch.float64, device=device)
        self._held_out = held_out
        # sums and counts before the present segment
        self._before = [value.clone() for value in self._running()]
        self._segment = 0
        self._pending: list[tuple[Tensor, ...]] = []

    def add(self, x: Tensor, valid: Tensor | None, segment: int) -> None:
        """Accumulate the valid rows of `x` (..., n), a batch of `segment`."""
        self._enter(segment)
        self._take((valid_rows(x, valid),), owned=valid is not None)

    def finish(self, ranks: Ranks) -> Moments:
        """The Moments of all batches of all ranks; nothing can be added afterwards."""
        self._close()
        moments = self._part
        total = moments.gram if self._whole is None else self._whole
        ranks.sum_triangle_(total)
        ranks.sum_(moments.sum)
        ranks.sum_(moments.count)
        if self._whole is not None:
            moments.gram.copy_(self._whole)
            self._whole = None
        return moments

    def finish_held(self, ranks: Ranks) -> Moments | None:
        """The Moments of the segments that are held out, of all ranks; after `finish`."""
        held, self._held = self._held, None
        if held is None:
            return None
        ranks.sum_triangle_(held.gram)
        ranks.sum_(held.sum)
        ranks.sum_(held.count)
        # rounded as those of all tokens are
        return Moments(held.count, held.sum, held.gram.to(self._part.gram.dtype))

    def _running(self) -> list[Tensor]:
        """Sums that go on over segments."""
        return [self._part.sum, self._part.count]

    def _held_running(self) -> list[Tensor]:
        """The same of what is held out; nothing where nothing is."""
        return [] if self._held is None else [self._held.sum, self._held.count]

    def _enter(self, segment: int) -> None:
        if segment != self._segment:
            self._close()
            self._segment = segment

    def _take(self, rows: tuple[Tensor, ...], *, owned: bool) -> None:
        """Sum rows of a batch, now or with those that follow; `owned` ones are of no other's."""
        if not self._pending and rows[0].shape[0] >= CHUNK_TOKENS:
            self._sum(*rows)
            return
        # a copy: the batch may leave memory before there are enough rows
        self._pending.append(rows if owned else tuple(part.clone() for part in rows))
        if sum(part[0].shape[0] for part in self._pending) >= CHUNK_TOKENS:
            self._flush()

    def _sum(self, x: Tensor, *_: Tensor) -> None:
        gram(x, out=self._part)

    def _flush(self) -> None:
        if self._pending:
            columns = zip(*self._pending, strict=True)
            self._sum(*(torch.cat(part) if len(part) > 1 else part[0] for part in columns))
            self._pending = []

    def _close(self) -> None:
        """Move the segment's sums to the float64 ones."""
        self._flush()
        if self._whole is None:
            return
        targets = [self._whole]
        if self._held is not None and self._segment in self._held_out:
            targets.append(self._held.gram)
            for held, now, before in zip(
                self._held_running(), self._running(), self._before, strict=True
            ):
                held += now - before
        self._before = [value.clone() for value in self._running()]
        for start in range(0, self._whole.shape[0], _ROWS):
            stop = start + _ROWS
            for target in targets:
                # the triangle: what is above the diagonal blocks is unspecified
                target[start:stop, :stop] += self._part.gram[start:stop, :stop]
        self._part.gram.zero_()


class SitePairs(SiteMoments):
    """Accumulates the Moments of one Site, and the drift of its consumer's output.

    Args:
        outputs: of the consumer; the others as of SiteMoments.
    """

    def __init__(
        self,
        outputs: int,
        columns: int,
        device: torch.device,
        *,
        dtype: torch.dtype,
        alone: bool,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        self._drift = Drift.zeros(outputs, columns, dtype=dtype, device=device)
        self._held_drift: Drift | None = None
        if held_out:
            self._held_drift = Drift.zeros(outputs, columns, dtype=torch.float64, device=device)
        super().__init__(columns, device, dtype=dtype, alone=alone, held_out=held_out)
        self._whole_cross: Tensor | None = None
        if self._whole is not None:
            self._whole_cross = torch.zeros_like(self._drift.pairs.cross, dtype=torch.float64)

    def add_pair(
        self, x: Tensor, local: Tensor, dense: Tensor, valid: Tensor | None, segment: int
    ) -> None:
        """Accumulate the valid rows of a batch of `segment`.

        Args:
            x: present inputs (..., n); local, dense: what the consumer makes of them, and what it
                made of the dense path's (..., out), both with its bias or both without.
        """
        self._enter(segment)
        wanted = valid_rows(dense, valid)
        change = wanted - valid_rows(local, valid)
        self._drift.dense.add(wanted)
        self._drift.change.add(change)
        self._take((valid_rows(x, valid), change), owned=valid is not None)

    def finish_pair(self, ranks: Ranks) -> Sample:
        """Of all batches of all ranks; nothing can be added afterwards."""
        moments = self.finish(ranks)
        whole, self._whole_cross = self._whole_cross, None
        return Sample(moments, _summed(self._drift, whole, ranks))

    def finish_held_pair(self, ranks: Ranks) -> Sample | None:
        """Of the segments that are held out, of all ranks; after `finish_pair`."""
        moments, drift = self.finish_held(ranks), self._held_drift
        self._held_drift = None
        if moments is None or drift is None:
            return None
        drift = _summed(drift, None, ranks)
        pairs = drift.pairs
        # rounded as those of all tokens are
        own = replace(pairs, cross=pairs.cross.to(self._drift.pairs.cross.dtype))
        return Sample(moments, replace(drift, pairs=own))

    def _running(self) -> list[Tensor]:
        return super()._running() + _tallies(self._drift)

    def _held_running(self) -> list[Tensor]:
        beside = [] if self._held_drift is None else _tallies(self._held_drift)
        return super()._held_running() + beside

    def _sum(self, x: Tensor, *rest: Tensor) -> None:
        super()._sum(x)
        cross(rest[0], x, out=self._drift.pairs)

    def _close(self) -> None:
        super()._close()
        if self._whole_cross is not None:
            own = self._drift.pairs.cross
            self._whole_cross += own
            if self._held_drift is not None and self._segment in self._held_out:
                self._held_drift.pairs.cross.add_(own)
            own.zero_()


def _tallies(drift: Drift) -> list[Tensor]:
    """The sums and counts of a drift; all but its products."""
    pairs, columns = drift.pairs, (drift.change, drift.dense)
    beside = [value for c in columns for value in (c.count, c.sum, c.squares)]
    return [pairs.sum_x, pairs.sum_y, pairs.count, *beside]


def _summed(drift: Drift, whole: Tensor | None, ranks: Ranks) -> Drift:
    """Of all ranks; `whole`: float64 products that take the place of its own."""
    cross = drift.pairs.cross if whole is None else whole
    for value in (cross, *_tallies(drift)):
        ranks.sum_(value)
    if whole is not None:
        drift.pairs.cross.copy_(whole)
    return drift


class SiteColumns:
    """Accumulates column statistics of one Site; float64 sums, so the order does not show."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._columns = ColumnMoments.zeros(columns, device)

    def add(self, x: Tensor, valid: Tensor | None, segment: int) -> None:
        """Accumulate the valid rows of `x` (..., n)."""
        self._columns.add(valid_rows(x, valid))

    def finish(self, ranks: Ranks) -> ColumnMoments:
        """The statistics of all batches of all ranks."""
        for value in (self._columns.count, self._columns.sum, self._columns.squares):
            ranks.sum_(value)
        return self._columns


@dataclass(frozen=True)
class Turn:
    """How layers turn their hidden states, means over the valid tokens.

    Attributes: `influence`, 1 − cosine of what enters and leaves, 0 to 2; `angle` between them over
    π, 0 to 1.
    """

    influence: float
    angle: float


class StateSimilarity:
    """The `Turn` from the hidden states that enter a layer, or a span of them, to those that leave.

    A token whose state is zero counts as a right angle (`ops.row_cosines`). Sums are kept by
    segment, and a segment is one rank's: that of all ranks is the same to the bit.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, MOST_SEGMENTS, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, before: Tensor, after: Tensor, valid: Tensor | None, segment: int) -> None:
        """Accumulate the valid rows of both (..., d)."""
        # the op takes the valid rows itself: no copy of either, in whatever dtype
        cosines = row_cosines(valid_rows(before, None), valid_rows(after, None), valid).double()
        self._sums[0, segment] += (1 - cosines).sum()
        self._sums[1, segment] += cosines.acos().sum() / math.pi
        self._count += cosines.numel()

    def finish(self, ranks: Ranks) -> Turn:
        """Of all batches of all ranks."""
        ranks.sum_(self._sums)
        ranks.sum_(self._count)
        influence, angle = (self._sums.sum(1) / self._count.clamp(min=1)).tolist()
        return Turn(influence, angle)

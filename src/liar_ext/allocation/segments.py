"""segments: what each change of a layer, and each run of layers left out, does to the whole model
is measured, and a dynamic programme over the layers' boundaries adds it up under the budget.

LayerMerge's tables and programme (arXiv 2406.12837) for transformers: between boundaries i and j
the model keeps one layer as it is, or narrower, or without its attention, or without its FFN, or
leaves out all layers of the segment. Importance is the loss of the model with that one change,
after its repair; time is the sum of what the budget counts. Changes are taken to add up, which they
do not quite: the best few plans are judged whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from liar_ext.allocation import uniform
from liar_ext.allocation.base import Allocation
from liar_ext.allocation.search import Call, Candidate, Oracle, Problem, rounded
from liar_ext.allocation.space import Positions, Space
from liar_ext.allocation.trials import Trials
from liar_ext.errors import InputError

# layers that are left out as one segment, at most
LONGEST = 6
# plans that are judged whole, at most
PLANS = 24
# of the evaluations, what the table of single changes may take
TABLE = 0.5
# the budget is cut into so many, and costs are rounded up to one: a plan never costs more than it
# seems to
SLOTS = 2000
# of a model whose loss is not finite
LOST = 1e6
# levels that `calls` takes a Site to have, and Sites a layer
_LEVELS, _SITES = 12, 2


@dataclass(frozen=True)
class Segment:
    """What may stand between two boundaries.

    Attributes:
        stop: the boundary behind it; it begins at the one that lists it.
        cost, loss: what the budget counts, and what it adds to the loss.
        places: of the levels of the segment's Sites, in their order.
    """

    stop: int
    cost: float
    loss: float
    places: tuple[int, ...]


def plans(segments: Sequence[Sequence[Segment]], most: float, count: int) -> list[list[Segment]]:
    """The `count` ways with the least sums of losses from the first boundary to the last.

    Exact where all costs are multiples of `most / SLOTS`, otherwise for costs rounded up to one.

    Args:
        segments: those that begin at each boundary, (layers,).
        most: what a way may cost.
    Returns:
        ways, the best first; fewer where there are fewer.
    """
    end = len(segments)
    slot = most / SLOTS
    # boundary -> the least losses of a rest that costs a number of slots or less, best first
    best = [np.full((count, SLOTS + 1), np.inf) for _ in range(end + 1)]
    # which segment that rest begins with, and which of the ways behind it it goes on with
    picks: list[np.ndarray] = [np.zeros((count, SLOTS + 1), np.int64) for _ in range(end)]
    best[end][0] = 0.0
    for start in reversed(range(end)):
        tried = []
        for segment in segments[start]:
            weight = math.ceil(segment.cost / slot - 1e-9)
            found = np.full((count, SLOTS + 1), np.inf)
            if weight <= SLOTS:
                found[:, weight:] = best[segment.stop][:, : SLOTS + 1 - weight] + segment.loss
            tried.append(found)
        stacked = np.concatenate(tried)
        # a whole sort of all segments times `count` would take most of the time
        least = stacked.argpartition(count - 1, 0)[:count] if len(stacked) > count else None
        order = stacked.argsort(0) if least is None else least
        losses = np.take_along_axis(stacked, order, 0)
        ranks = losses.argsort(0, kind="stable")
        best[start] = np.take_along_axis(losses, ranks, 0)
        picks[start] = np.take_along_axis(order, ranks, 0)
    return [
        _followed(segments, picks, best, rank, slot, count)
        for rank in range(count)
        if math.isfinite(best[0][rank, SLOTS])
    ]


def _followed(
    segments: Sequence[Sequence[Segment]],
    picks: Sequence[np.ndarray],
    best: Sequence[np.ndarray],
    rank: int,
    slot: float,
    count: int,
) -> list[Segment]:
    found: list[Segment] = []
    start, left = 0, SLOTS
    while start < len(segments):
        which, rank = divmod(int(picks[start][rank, left]), count)
        segment = segments[start][which]
        found.append(segment)
        left -= math.ceil(segment.cost / slot - 1e-9)
        start = segment.stop
    return found


@dataclass(frozen=True)
class _Layers:
    """The Sites of a problem by layer, for those layers that have any."""

    space: Space
    members: list[list[int]]

    @classmethod
    def of(cls, problem: Problem) -> _Layers:
        by_layer: dict[int, list[int]] = {}
        for site, layer in enumerate(problem.layers or range(len(problem.budgets))):
            by_layer.setdefault(layer, []).append(site)
        return cls(Space(problem), list(by_layer.values()))

    @property
    def dense(self) -> Positions:
        return tuple(len(own) - 1 for own in self.space.levels)

    def changed(self, changes: dict[int, int]) -> Positions:
        """The dense model with some Sites at other places."""
        return tuple(changes.get(site, place) for site, place in enumerate(self.dense))

    def singles(self, kept: int) -> list[tuple[int, int]]:
        """(Site, place) of one change each: up to `kept` of the levels below the dense one."""
        found = []
        for site, own in enumerate(self.space.levels):
            below = len(own) - 1
            places = {round(p) for p in np.linspace(0, below - 1, min(kept, below))}
            found += [(site, place) for place in sorted(places)]
        return found

    def spans(self) -> list[tuple[int, int]]:
        """Runs of layers, [start, stop), that can be left out whole."""
        gone = [all(self.space.levels[site][0] == 0 for site in own) for own in self.members]
        return [
            (start, stop)
            for start in range(len(gone))
            for stop in range(start + 1, min(start + LONGEST, len(gone)) + 1)
            # of one Site, leaving it out is one of its levels
            if all(gone[start:stop]) and sum(map(len, self.members[start:stop])) > 1
        ]

    def without(self, span: tuple[int, int]) -> Positions:
        return self.changed({site: 0 for own in self.members[slice(*span)] for site in own})


def search(problem: Problem, oracle: Oracle) -> Candidate:
    """At least as good as uniform, which is judged as well.

    Raises:
        InputError: too few evaluations for the table.
    """
    layers = _Layers.of(problem)
    space = layers.space
    trials = Trials(space, oracle)
    even = space.uniform()
    trials.losses([even])
    errors, gone = _measured(layers, trials)
    chosen = plans(_segments(layers, errors, gone), problem.most, PLANS)

    def key(site: int, place: int) -> float:
        return errors[site][place] - errors[site][place - 1]

    found = [_positions(layers, plan) for plan in chosen]
    judged = [
        # what is gone stays gone: the first unit of a part costs more than it gives
        space.filled(own, key, [site for site, n in enumerate(space.candidate(own)) if not n])
        for own in found
        if space.fits(own)
    ]
    judged = list(dict.fromkeys([even, *judged]))
    losses = trials.losses(judged)
    return space.candidate(judged[losses.index(min(losses))])


def _measured(
    layers: _Layers, trials: Trials
) -> tuple[list[list[float]], dict[tuple[int, int], float]]:
    """The loss of the model with each Site at each of its places, and without each span."""
    kept, share = _table(layers, trials.left)
    singles, spans = layers.singles(kept), layers.spans()
    # from the last layer: what is the same before it is computed once for several
    order = sorted(singles, reverse=True)
    losses = trials.losses([layers.changed({site: place}) for site, place in order], share)
    known = dict(zip(order, losses, strict=True))
    errors = []
    for site, own in enumerate(layers.space.levels):
        places = [place for place in range(len(own) - 1) if (site, place) in known]
        measured = [min(known[site, place], LOST) for place in places]
        # more units are never worse: noise would have it otherwise now and then
        falling = np.maximum.accumulate([*measured, 0.0][::-1])[::-1]
        line = np.interp(range(len(own)), [*places, len(own) - 1], falling)
        errors.append([float(error) for error in line])
    gone = dict(zip(spans, trials.losses([layers.without(s) for s in spans], share), strict=True))
    return errors, gone


def _table(layers: _Layers, evaluations: float) -> tuple[int, float]:
    """How many levels of each Site are measured, on what share of the windows.

    All on as many windows as the evaluations allow, half of them at most: plans are told from
    single changes by being judged on all. If not even one window is enough for all, fewer levels.
    """
    allowed = TABLE * evaluations
    spans, most = len(layers.spans()), max(map(len, layers.space.levels)) - 1
    windows = layers.space.problem.windows
    whole = 2 if windows is None else windows
    for kept in range(most, 0, -1):
        entries = len(layers.singles(kept)) + spans
        share = min(whole // 2, math.floor(allowed / entries * whole)) / whole
        if share > 0:
            return kept, share
    if whole < 2:
        raise InputError(
            "--allocation segments measures single changes on some of the search's windows and "
            f"plans on all, and there is {whole}; raise --search-samples, or --samples"
        )
    entries = len(layers.singles(1)) + spans
    least = math.ceil(entries / whole / TABLE) + 1
    raise InputError(
        f"--search-evaluations {layers.space.problem.evaluations}: --allocation segments measures "
        f"{entries} single changes first, each on one of {whole} windows at least; give "
        f"{least} or more"
    )


def check(problem: Problem) -> str | None:
    """Raises InputError where the evaluations or the windows do not allow for the table; says how
    coarse it is where not every level is measured."""
    layers = _Layers.of(problem)
    # the first is of uniform widths
    kept, _ = _table(layers, problem.evaluations - 1)
    most = max(map(len, layers.space.levels)) - 1
    if kept == most:
        return None
    return (
        f"--allocation segments measures {kept} of up to {most} levels of each Site, and reads the "
        "others off lines between them; more --search-evaluations or --search-samples measure more"
    )


def _segments(
    layers: _Layers, errors: Sequence[Sequence[float]], gone: dict[tuple[int, int], float]
) -> list[list[Segment]]:
    found: list[list[Segment]] = []
    prices = layers.space.prices
    for start, own in enumerate(layers.members):
        segments = []
        for places in product(*(range(len(layers.space.levels[site])) for site in own)):
            if not any(places) and (start, start + 1) in gone:
                # measured as one, below
                continue
            cost = sum(prices[site][place] for site, place in zip(own, places, strict=True))
            loss = sum(errors[site][place] for site, place in zip(own, places, strict=True))
            segments.append(Segment(start + 1, cost, loss, places))
        for (first, stop), loss in gone.items():
            if first == start:
                none = (0,) * sum(map(len, layers.members[start:stop]))
                segments.append(Segment(stop, 0.0, loss, none))
        found.append(segments)
    return found


def _positions(layers: _Layers, plan: Sequence[Segment]) -> Positions:
    order = [site for own in layers.members for site in own]
    places = [place for segment in plan for place in segment.places]
    now = dict(zip(order, places, strict=True))
    return tuple(now[site] for site in range(len(order)))


def calls(evaluations: int, sites: int, windows: int) -> list[Call]:
    """As many levels and Sites of a layer as there are mostly, and layers that may go whole."""
    left = max(evaluations - 1, 0)
    entries = sites * _LEVELS + LONGEST * sites // _SITES
    share = rounded(min(0.5, TABLE * left / max(entries, 1)), windows)
    table = min(entries, int(TABLE * left / share + 1e-9)) if left else 0
    later = min(PLANS, int(left - table * share))
    return [(min(1, evaluations), 1.0), *([(table, share)] if table else []), (later, 1.0)]


SEGMENTS = Allocation(
    "segments",
    uniform.wanted,
    survey=None,
    equal=False,
    search=search,
    calls=calls,
    check=check,
    prices=True,
)

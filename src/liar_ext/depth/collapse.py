"""LaCo's search: from the top down, layers are merged where the model stays like the original.

Source: LaCo (arXiv 2402.11187), Algorithm 1. Nothing here knows of models: what a merged model's
similarity to the original is, is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from liar_ext.depth.merge_settings import MergeSettings, Schedule
from liar_ext.depth.mixture import Mixture, merged
from liar_ext.errors import InputError
from liar_ext.report.text import number

# of a threshold that is said: what is read off it decides as it does
DIGITS = 10_000

# the layers of a model, from the first
State = tuple[Mixture, ...]
# a model, and below which of its layers it is the original -> its similarity to the original
Similarity = Callable[[State, int], float]


@dataclass(frozen=True)
class Trial:
    """One merge that was looked at.

    Attributes:
        base: the layer of the source whose place the merged layer takes.
        absorbed: those that go with it, by their own places in the source; a layer that has taken
            others in before brings these along, which are not named again.
        layers: of the model after it; similarity: of that model to the original.
    """

    base: int
    absorbed: tuple[int, ...]
    layers: int
    similarity: float


@dataclass(frozen=True)
class Outcome:
    """What a search has found.

    Attributes:
        state: the model's layers; accepted, refused: merges in the order they were looked at.
        threshold: what was, or would have been, asked for.
    """

    state: State
    accepted: tuple[Trial, ...]
    refused: tuple[Trial, ...]
    threshold: float

    @property
    def closest(self) -> Trial | None:
        """Of the merges that were refused, the one with the highest similarity."""
        known = [trial for trial in self.refused if math.isfinite(trial.similarity)]
        return max(known, key=lambda trial: trial.similarity, default=None)


def collapse(count: int, settings: MergeSettings, similarity: Similarity) -> Outcome:
    """The merges of a model of `count` layers.

    Args:
        similarity: is asked once for each model.
    Raises:
        InputError: nothing is similar enough, or fewer layers go than `drop` asks for; it says how
            similar the best that was refused is.
    """
    schedule = settings.schedule(count)

    def merge(layers: Sequence[Mixture]) -> Mixture:
        return merged(layers, settings.rule, settings.norms)

    walk = _Walk(schedule, merge, similarity)
    if schedule.threshold is None:
        return _strictest(walk)
    found = walk(schedule.threshold)
    gone, wanted = count - len(found.state), schedule.drop
    if gone and (wanted is None or gone == wanted):
        return found
    least = f"--threshold {schedule.threshold:g}"
    if wanted is None:
        raise InputError(
            f"no merge is above {least}: {_best(found)}; give a lower one, or --drop N to have it "
            "chosen"
        )
    raise InputError(
        f"--drop {wanted}: {gone} go, no other merge is above {least}: {_best(found)}; give a "
        "lower one, or none to have it chosen"
    )


def _strictest(walk: _Walk) -> Outcome:
    """The search under the highest threshold with which `drop` layers go.

    What a threshold does changes only at similarities of merges that it refuses: the next lower
    one to look at is the highest of them. Models that were asked for before are known. No
    bisection: more merges under a lower threshold may well be fewer layers, and what bisection
    ends at can be far below the highest.
    """
    schedule, threshold = walk.schedule, 1.0
    while True:
        found = walk(threshold)
        gone = schedule.count - len(found.state)
        if gone == schedule.drop:
            return replace(found, threshold=_between(found))
        closest = found.closest
        if closest is None:
            broken = " (the others make models that are not finite)" if found.refused else ""
            raise InputError(
                f"--drop {schedule.drop}: with every merge accepted{broken} {gone} layers go; "
                f"raise --combine {schedule.combine} or --highest {schedule.highest}, or lower "
                f"--lowest {schedule.lowest} or --interval {schedule.interval}"
            )
        threshold = math.nextafter(closest.similarity, -math.inf)


def _between(found: Outcome) -> float:
    """A threshold that decides as this search has, as far as can be from all similarities; where
    nothing was refused, the least similarity rounded down."""
    least = min(trial.similarity for trial in found.accepted)
    if found.closest is None:
        lower = math.floor(least * DIGITS) / DIGITS
        return lower if lower < least else lower - 1 / DIGITS
    most = found.closest.similarity
    middle = (least + most) / 2
    # neighbours among floats have no middle; the lower one refuses and accepts as it should
    return middle if most <= middle < least else most


@dataclass
class _Walk:
    """The loop of Algorithm 1 under a threshold; asks once for each model.

    With `drop`, it ends when so many layers are gone.
    """

    schedule: Schedule
    merge: Callable[[Sequence[Mixture]], Mixture]
    ask: Similarity
    known: dict[State, float] = field(default_factory=dict)

    def __call__(self, threshold: float) -> Outcome:
        schedule = self.schedule
        state: State = tuple(Mixture.of(layer) for layer in range(schedule.count))
        accepted: list[Trial] = []
        refused: list[Trial] = []
        at, gone = schedule.bases.start, 0
        # layers below `at` are those of the original, and one above it is always left: the
        # published loop steps back from the end of the model as well, which never comes to pass
        while at >= schedule.lowest and gone != schedule.drop:
            most = min(schedule.combine - 1, len(state) - at - 1)
            if schedule.drop is not None:
                most = min(most, schedule.drop - gone)
            group, above = state[at : at + most + 1], state[at + most + 1 :]
            candidate = (*state[:at], self.merge(group), *above)
            absorbed = tuple(layer.base for layer in group[1:])
            trial = Trial(at, absorbed, len(candidate), self._asked(candidate, at))
            # what is not a number is not above it
            if trial.similarity > threshold:
                accepted.append(trial)
                state, gone = candidate, gone + most
                at -= schedule.interval
            else:
                refused.append(trial)
                at -= 1
        return Outcome(state, tuple(accepted), tuple(refused), threshold)

    def _asked(self, state: State, first: int) -> float:
        if state not in self.known:
            self.known[state] = self.ask(state, first)
        return self.known[state]


def _best(found: Outcome) -> str:
    if found.closest is None:
        return "their similarities are not finite" if found.refused else "none is left to look at"
    trial = found.closest
    return f"the highest is {number(trial.similarity, 4)}, {described(trial)}"


def described(trial: Trial) -> str:
    """`layer 20 with 21, 22, 23`."""
    return f"layer {trial.base} with {listed(trial.absorbed)}"


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))

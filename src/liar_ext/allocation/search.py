"""Search: an allocation that tries whole models, through an oracle that says how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from liar_ext.allocation.base import Budget

# candidates that go through the layers at once on all windows, of fewer windows more: what an
# oracle that streams is asked at a time
TOGETHER = 8

# kept units of every Site, each one of that Site's levels
Candidate = tuple[int, ...]


class Oracle(Protocol):
    """What a search asks; answers to questions that were asked before cost nothing."""

    def losses(self, candidates: Sequence[Candidate], share: float = 1.0) -> list[float]:
        """How far the assembled models are from the dense one, 0 or more; less is better.

        Candidates of one call go through the model together, so that each layer is read once.

        Args:
            share: of the search's windows, the first ones; a cheaper and noisier answer.
        """
        ...


@dataclass(frozen=True)
class Problem:
    """What a search is to solve.

    Attributes:
        budgets: of every Site, in order, with findings where the allocation has a survey.
        sparsity: fraction of the dense price to remove.
        levels: kept units that may be tried of each Site, ascending, the last one dense.
        evaluations: candidates that may be tried, each with all windows; a `share` of them counts
            as that share.
        seed: of every random choice.
        windows: that models are compared on, where a `share` of them is rounded up to whole ones.
        layers: of each Site, the layer that it is in; empty where each has one of its own.
    """

    budgets: Sequence[Budget]
    sparsity: float
    levels: Sequence[tuple[int, ...]]
    evaluations: int
    seed: int
    windows: int | None = None
    layers: Sequence[int] = ()

    @property
    def most(self) -> float:
        """The price that a candidate may have."""
        return (1 - self.sparsity) * sum(b.price(b.units) for b in self.budgets)

    def price(self, candidate: Sequence[int]) -> float:
        return sum(b.price(units) for b, units in zip(self.budgets, candidate, strict=True))


# the best candidate that was found
Search = Callable[[Problem, Oracle], Candidate]
# candidates of a call of the oracle, and their share of the windows
Call = tuple[int, float]
# evaluations, Sites, windows -> what a search asks where candidates do not run out, for a plan
Calls = Callable[[int, int, int], list[Call]]


def in_steps(evaluations: int, each: int) -> list[Call]:
    """Calls of one model first and then `each` at a time, all on all windows."""
    later = range(1, evaluations, each)
    return [(1, 1.0), *((min(each, evaluations - done), 1.0) for done in later)]


def rounded(share: float, windows: int | None) -> float:
    """The share that so many windows allow, `share` or more."""
    return share if windows is None else math.ceil(share * windows - 1e-9) / windows

"""Trials: what a search has asked, what that cost, and the best candidate so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from liar_ext.allocation.search import Candidate, Oracle, rounded
from liar_ext.allocation.space import Positions, Space

# draws in a row that bring nothing new, before a search takes its surroundings for exhausted
PATIENCE = 100


class Trials:
    """Asks the oracle, never twice the same and never beyond the problem's evaluations.

    What is asked depends on the answers alone, not on where they come from: a run that is
    interrupted asks the same again and gets its answers from memory.
    """

    def __init__(self, space: Space, oracle: Oracle) -> None:
        """Raises:
        ValueError: not even one candidate may be tried.
        """
        self._space, self._oracle = space, oracle
        if space.problem.evaluations < 1:
            raise ValueError(f"evaluations: {space.problem.evaluations}, but a search takes one")
        self._known: dict[float, dict[Positions, float]] = {1.0: {}}
        self.left = float(space.problem.evaluations)

    def losses(self, tried: Sequence[Positions], share: float = 1.0) -> list[float]:
        """Loss of each; infinite where it is not finite, or no evaluations are left for it."""
        share = self.rounded(share)
        known = self._known.setdefault(share, {})
        fresh = [p for p in dict.fromkeys(tried) if p not in known]
        # shares such as 1/3 do not add up to whole numbers
        fresh = fresh[: math.floor(self.left / share + 1e-9)]
        if fresh:
            self.left = max(self.left - len(fresh) * share, 0.0)
            asked = [self._space.candidate(positions) for positions in fresh]
            for positions, loss in zip(fresh, self._oracle.losses(asked, share), strict=True):
                known[positions] = loss if math.isfinite(loss) else math.inf
        return [known.get(positions, math.inf) for positions in tried]

    def rounded(self, share: float) -> float:
        """The share that the windows of the problem allow, `share` or more."""
        return rounded(share, self._space.problem.windows)

    def fresh(self, draw: Callable[[], Positions], count: int) -> list[Positions]:
        """Up to `count` different candidates that were not tried with all windows yet.

        Fewer where `PATIENCE` draws in a row bring nothing new.
        """
        found: dict[Positions, None] = {}
        missed = 0
        while len(found) < count and missed < PATIENCE:
            drawn = draw()
            missed = missed + 1 if drawn in found or drawn in self._known[1.0] else 0
            if not missed:
                found[drawn] = None
        return list(found)

    def ranked(self) -> list[Positions]:
        """Those tried with all windows, best first, then in the order in which they were tried."""
        known = self._known[1.0]
        return sorted(known, key=known.__getitem__)

    def best(self) -> Candidate:
        return self._space.candidate(self.ranked()[0])

"""spdy: the dynamic programme of `levels`, with a sensitivity of each Site that is searched for.

    min Σ c_l · err_l(level_l)    subject to    Σ price_l(level_l) <= budget

SPDY (arXiv 2201.13096) with the errors of ZipLM (2302.04089): the local errors know nothing of what
an error does to the next layers. Each c is judged by the whole model that it leads to. Coefficients
are drawn from [0, 1], the best ones go on, and are drawn again a few at a time: a tenth of them,
then fewer, down to one.
"""

from __future__ import annotations

import numpy as np

from liar_ext.allocation import levels
from liar_ext.allocation.base import Allocation
from liar_ext.allocation.search import TOGETHER, Call, Candidate, Oracle, Problem
from liar_ext.allocation.space import Positions, Space
from liar_ext.allocation.trials import Trials

# the most that are drawn anew before the search goes on around the best
DRAWN = 100
# of the coefficients, the most that change at once around the best
NEIGHBOURHOOD = 0.1


def search(problem: Problem, oracle: Oracle) -> Candidate:
    """At least as good as uniform and as `levels`: these are tried first."""
    space = Space(problem)
    trials = Trials(space, oracle)
    errors = space.errors()
    sites = len(space.levels)
    generator = np.random.default_rng(problem.seed)
    best = np.ones(sites)
    found = {space.solved(errors, best): best}
    trials.losses([space.uniform(), *found])

    def drawn(changed: int) -> Positions:
        """The solution for the best coefficients so far with some of them drawn again."""
        weights = best.copy()
        weights[generator.permutation(sites)[:changed]] = generator.random(changed)
        positions = space.solved(errors, weights)
        found.setdefault(positions, weights)
        return positions

    sizes = _sizes(sites)
    for stage, changed in enumerate(sizes):
        spend = _spend(trials.left, stage, len(sizes))
        while spend > 0:
            tried = trials.fresh(lambda n=changed: drawn(n), min(TOGETHER, spend))  # type: ignore[misc]
            if not tried:
                break
            trials.losses(tried)
            spend -= len(tried)
            best = found[next(p for p in trials.ranked() if p in found)]
    return trials.best()


def _sizes(sites: int) -> list[int]:
    """Coefficients that are drawn anew, stage by stage."""
    return [sites, *range(max(1, round(NEIGHBOURHOOD * sites)), 0, -1)]


def _spend(left: float, stage: int, stages: int) -> int:
    """Evaluations of a stage: each gets the same part of what is left."""
    spend = int(left / (stages - stage))
    return min(DRAWN, spend) if stage == 0 else spend


def calls(evaluations: int, sites: int, windows: int) -> list[Call]:
    found = [(min(2, evaluations), 1.0)]
    left, stages = evaluations - found[0][0], len(_sizes(sites))
    for stage in range(stages):
        spend = _spend(left, stage, stages)
        left -= spend
        found += [(min(TOGETHER, spend - done), 1.0) for done in range(0, spend, TOGETHER)]
    return found


SPDY = Allocation(
    "spdy", levels.wanted, survey="levels", equal=False, search=search, calls=calls, prices=True
)

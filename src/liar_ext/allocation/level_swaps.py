"""level-swaps: evolution by Sites that trade a level, most of it judged on a few windows.

Tyr-the-Pruner (arXiv 2503.09657) and DarwinLM (2502.07780): of the best models so far, offspring
with one to four swaps each; a part of the windows says which of them are worth more of them. Swaps
get smaller during the search, an eighth of a Site at first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from liar_ext.allocation import levels
from liar_ext.allocation.base import Allocation
from liar_ext.allocation.search import Call, Candidate, Oracle, Problem, rounded
from liar_ext.allocation.space import Positions, Space
from liar_ext.allocation.trials import Trials

# share of the windows on which a stage judges; Tyr's 2,048, 16,384 and 131,072 tokens
SHARES = (1 / 64, 1 / 8)
# evaluations that each of these stages costs: of Tyr's 128 and 16 offspring
EACH = 2
# how many are judged on all windows
LAST = 4
PARENTS = 2
SWAPS = 4
# part of a Site's levels that a swap goes up, and how often that is halved; Tyr's 12.5 to 1.56 %
STRIDE, HALVINGS = 1 / 8, 3
# of the swaps, those in which the other Site may be of another kind
BETWEEN_KINDS = 0.25


def search(problem: Problem, oracle: Oracle) -> Candidate:
    """Never worse than uniform and `levels`: it starts from both."""
    space = Space(problem)
    trials = Trials(space, oracle)
    generator = np.random.default_rng(problem.seed)
    even = [1.0] * len(space.levels)
    trials.losses([space.uniform(), space.solved(space.errors(), even)])

    while trials.left >= 1:
        parents = trials.ranked()[:PARENTS]
        stride = STRIDE / 2 ** int((HALVINGS + 1) * (1 - trials.left / problem.evaluations))

        def drawn(parents: list[Positions] = parents, stride: float = stride) -> Positions:
            return mutated(space, parents[int(generator.integers(len(parents)))], stride, generator)

        stages = [trials.rounded(share) for share in SHARES]
        counts = _counts(trials.left, stages)
        offspring = trials.fresh(drawn, counts[0] if trials.left >= 2 else 1)
        if not offspring:
            break
        for share, kept in zip(stages, counts[1:], strict=True):
            if len(offspring) > kept:
                losses = trials.losses(offspring, share)
                order = sorted(range(len(offspring)), key=losses.__getitem__)
                offspring = [offspring[place] for place in order[:kept]]
        trials.losses(offspring)
    return trials.best()


def mutated(space: Space, parent: Positions, stride: float, generator: Generator) -> Positions:
    """One to `SWAPS` swaps, few of them more often; what that leaves is spent at random."""
    drawn = generator.integers(1, SWAPS + 1, 2)
    now = parent
    for _ in range(int(drawn.min())):
        now = _swapped(space, now, stride, generator)
    return space.filled(now, lambda site, position: float(generator.random()))


def _swapped(space: Space, positions: Positions, stride: float, generator: Generator) -> Positions:
    """One Site goes up, others down until the budget holds, one as far as it can first.

    Args:
        stride: how far up, as a part of the Site's levels; one level at least.

    Returns:
        The same positions where there is nothing to trade.
    """
    kinds = [budget.kind for budget in space.problem.budgets]
    order = generator.permutation(len(positions)).tolist()
    any_kind = generator.random() < BETWEEN_KINDS
    for raised in order:
        top = len(space.levels[raised]) - 1
        if positions[raised] == top:
            continue
        now = list(positions)
        now[raised] = min(top, now[raised] + max(1, round(stride * len(space.levels[raised]))))
        for other in order:
            if other == raised or not (any_kind or kinds[other] == kinds[raised]):
                continue
            while now[other] > 0 and not space.fits(now):
                now[other] -= 1
        if space.fits(now):
            return tuple(now)
    return positions


def _counts(left: float, stages: Sequence[float]) -> list[int]:
    """Offspring that each stage judges, and how many are judged on all windows."""
    # what is left may not pay for a whole generation
    part = min(1.0, left / (LAST + EACH * len(stages)))
    last = max(1, int(part * LAST))
    # fewer offspring where a window is a larger share than the stage wants
    return [max(last, int(part * EACH / share)) for share in stages] + [last]


def calls(evaluations: int, sites: int, windows: int) -> list[Call]:
    found = [(min(2, evaluations), 1.0)]
    left = float(evaluations - found[0][0])
    stages = [rounded(share, windows) for share in SHARES]
    while left >= 1:
        counts = _counts(left, stages)
        offspring = counts[0] if left >= 2 else 1
        for share, kept in zip([*stages, 1.0], [*counts[1:], 0], strict=True):
            if offspring > kept:
                asked = min(offspring, int(left / share + 1e-9))
                found += [(asked, share)] if asked else []
                left = max(left - asked * share, 0.0)
                offspring = min(offspring, kept)
    return found


LEVEL_SWAPS = Allocation(
    "level-swaps",
    levels.wanted,
    survey="levels",
    equal=False,
    search=search,
    calls=calls,
    prices=True,
)

"""rl-pruner: a distribution of what is removed over the Sites, learnt from rewards (2411.06463).

    p' = clamp(p + σ · u · N(0, 1), least), normalised        u from [0, 1], one for all Sites
    p <- p · clamp((p + step · (p* - p)) / p, 1 - clip, 1 + clip), normalised

Site l loses the share p'_l of all that goes. The reward is minus the loss; p* is the best entry of
the replay buffer, or any of them with a probability ε that falls to zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from liar_ext.allocation import uniform
from liar_ext.allocation.base import Allocation
from liar_ext.allocation.search import Call, Candidate, Oracle, Problem, in_steps
from liar_ext.allocation.space import Positions, Space
from liar_ext.allocation.trials import Trials

Distribution = NDArray[np.float64]

# candidates of a step, as many as leave this number of steps, within these bounds
STEPS, LEAST_SAMPLES, MOST_SAMPLES = 16, 4, 16
# σ, and the least that an entry can be, both of the mean entry
NOISE, LEAST = 0.6, 0.01
# what σ grows by with every action in a row that leads to a known model: levels can be coarse
WIDER = 1.05
# as far as that goes: what is drawn then has little left of p
WIDEST = 16.0
STEP, CLIP = 1.0, 0.2
# ε at the start; it is zero when this part of the evaluations is spent
EXPLORE, EXPLORED = 0.4, 0.1


def search(problem: Problem, oracle: Oracle) -> Candidate:
    """Never worse than uniform: it starts there."""
    space = Space(problem)
    trials = Trials(space, oracle)
    generator = np.random.default_rng(problem.seed)
    samples = _samples(problem.evaluations)
    prices = np.array([own[-1] for own in space.prices])
    now = normalised(prices / prices.sum())
    # the replay buffer: actions, by the model that they lead to
    actions = {space.uniform(): now}
    trials.losses(list(actions))

    repeated = 0

    def drawn() -> Positions:
        nonlocal repeated
        spread = NOISE / len(now) * wider(repeated) * generator.random()
        action = normalised(now + spread * generator.standard_normal(len(now)))
        positions = placed(space, action)
        repeated = repeated + 1 if positions in actions else 0
        actions.setdefault(positions, action)
        return positions

    while trials.left >= 1:
        tried = trials.fresh(drawn, min(samples, int(trials.left)))
        if not tried:
            break
        trials.losses(tried)
        kept = trials.ranked()[:samples]
        spent = 1 - trials.left / problem.evaluations
        explore = EXPLORE * max(0.0, 1 - spent / EXPLORED)
        place = int(generator.integers(len(kept))) if generator.random() < explore else 0
        now = updated(now, actions[kept[place]])
    return trials.best()


def wider(repeated: int) -> float:
    """What σ is multiplied by after so many actions in a row that led to known models."""
    return min(WIDER ** min(repeated, 1000), WIDEST)


def normalised(entries: Distribution) -> Distribution:
    """Entries of about a distribution, of any signs and sum, made one.

    First raised to `LEAST` of the mean of a distribution: a division by a sum that noise has made
    negative would turn all of them round.
    """
    clamped = np.maximum(entries, LEAST / len(entries))
    return clamped / clamped.sum()


def updated(now: Distribution, towards: Distribution) -> Distribution:
    ratio = normalised(now + STEP * (towards - now)) / now
    return normalised(now * ratio.clip(1 - CLIP, 1 + CLIP))


def placed(space: Space, action: Distribution) -> Positions:
    """Every Site loses its part of the price that has to go; what it cannot, others do."""
    dense = [own[-1] for own in space.prices]
    removed = sum(dense) - space.problem.most
    wishes = [
        float(np.interp(price - part * removed, prices, own))
        for price, part, prices, own in zip(dense, action, space.prices, space.levels, strict=True)
    ]
    return space.place(wishes)


def _samples(evaluations: int) -> int:
    """Candidates of a step."""
    return min(MOST_SAMPLES, max(LEAST_SAMPLES, evaluations // STEPS))


def calls(evaluations: int, sites: int, windows: int) -> list[Call]:
    return in_steps(evaluations, _samples(evaluations))


RL_PRUNER = Allocation(
    "rl-pruner", uniform.wanted, survey=None, equal=False, search=search, calls=calls
)

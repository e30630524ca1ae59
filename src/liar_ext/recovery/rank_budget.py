"""Ranks under a budget of parameters, for gains that add up over layers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

# states of the dynamic programme: 32 layers and 32 ranks take seconds
STATES = 1 << 18


def allocate(
    gains: Sequence[np.ndarray], costs: Sequence[int], budget: int, *, least: int = 1
) -> list[int]:
    """Maximise `Σ_l gains[l][r_l]` subject to `Σ_l costs[l] r_l ≤ budget`, `r_l ≥ least`.

    Where all costs are the same and all gains concave, taking the largest next gain again and again
    is exact. Otherwise a dynamic programme over the budget in units of the costs' greatest common
    divisor is. Of more than 2¹⁸ such units, units are made larger and costs rounded up: the budget
    still holds, and each layer may miss less than a unit for each rank.

    Args:
        gains: (most + 1,) of each layer, its gain at rank 0, 1, ..., most; float64.
        costs: of one rank in each layer, positive.
    Returns:
        the ranks; of equal ones those that cost least.
    Raises:
        ValueError: the budget is less than `least` everywhere costs, or a layer has no such rank.
    """
    if any(len(own) <= least for own in gains) or sum(costs) * least > budget:
        raise ValueError(f"a budget of {budget} is not enough for rank {least} everywhere")
    if len(set(costs)) == 1 and all(_concave(own[least:]) for own in gains):
        return _greedy(gains, budget // costs[0], least)
    return _programme(gains, costs, budget, least)


def _concave(values: np.ndarray) -> bool:
    return bool(np.all(np.diff(values, 2) <= 1e-12 * np.abs(values).max(initial=0.0)))


def _greedy(gains: Sequence[np.ndarray], steps: int, least: int) -> list[int]:
    ranks = [least] * len(gains)

    def following(layer: int) -> tuple[float, int] | None:
        own, rank = gains[layer], ranks[layer]
        return (float(own[rank] - own[rank + 1]), layer) if rank + 1 < len(own) else None

    heap = [entry for layer in range(len(gains)) if (entry := following(layer))]
    heapq.heapify(heap)
    for _ in range(steps - sum(ranks)):
        if not heap or heap[0][0] >= 0:
            break
        _, layer = heapq.heappop(heap)
        ranks[layer] += 1
        if entry := following(layer):
            heapq.heappush(heap, entry)
    return ranks


def _programme(
    gains: Sequence[np.ndarray], costs: Sequence[int], budget: int, least: int
) -> list[int]:
    unit = math.gcd(*costs)
    # what rounding up costs must not make even the least ranks impossible
    rest = budget - least * sum(costs)
    while rest // unit > STATES:
        unit *= 2
    steps = rest // unit
    best = np.zeros(steps + 1)
    taken: list[np.ndarray] = []
    for own, cost in zip(gains, costs, strict=True):
        found = np.full(steps + 1, -np.inf)
        choice = np.zeros(steps + 1, dtype=np.int32)
        for more in range(len(own) - least):
            used = -(-more * cost // unit)
            if used > steps:
                break
            value = best[: steps + 1 - used] + own[least + more]
            better = value > found[used:]
            found[used:][better] = value[better]
            choice[used:][better] = more
        best = found
        taken.append(choice)
    # the first state with the best value has spent least
    at = int(np.argmax(best))
    ranks = []
    for choice, cost in zip(reversed(taken), reversed(costs), strict=True):
        more = int(choice[at])
        ranks.append(least + more)
        at -= -(-more * cost // unit)
    return ranks[::-1]

"""kwon: the most score that the budget can hold, heads and neurons ranked apart.

The MAC-constrained search of Kwon et al. (arXiv 2204.09656, algorithm 1): with heads and neurons
in descending order of score over all layers, keep the first n_h heads and as many neurons as the
budget then leaves, and of all n_h the one with the largest sum of scores. The scores are the
criterion's, summed over a unit and not standardised; with grouped-query attention the groups are
the heads.

In seconds it is the latency-constrained search of the paper: the time of t units is fitted by
`c + slope · max(t − T, 0)`, every Site that has to stay has its T best units for c, and what the
budget leaves goes to the others as before, at the slope of their kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.ranking import ranked, stays


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    hinges = [b.hinge for b in budgets]
    most = (1 - sparsity) * sum(h.price(b.units) for h, b in zip(hinges, budgets, strict=True))
    kinds = list(dict.fromkeys(b.kind for b in budgets))
    places = {kind: [i for i, b in enumerate(budgets) if b.kind == kind] for kind in kinds}
    lists = {kind: ranked([budgets[i] for i in places[kind]]) for kind in kinds}
    # of two kinds the shorter list is gone through, and the other one takes what is left
    kinds.sort(key=lambda kind: len(lists[kind][0]))
    least = [sum(stays(budgets[place]) for place in places[kind]) for kind in kinds]
    counts = _counts([lists[kind][:2] for kind in kinds], least, most)
    kept = [0.0] * len(budgets)
    for kind, count in zip(kinds, counts, strict=True):
        owner = lists[kind][2][:count]
        for place, units in zip(
            places[kind], torch.bincount(owner, minlength=len(places[kind])).tolist(), strict=True
        ):
            kept[place] = float(units)
    return kept


def _counts(lists: Sequence[tuple[Tensor, Tensor]], least: Sequence[int], most: float) -> list[int]:
    """How many of each list to keep: at least `least`, at a cost of `most` or less."""
    # of prefixes of 0, 1, 2, ... units
    sums, costs = ([_prefix(part[i]) for part in lists] for i in (0, 1))
    spare = most * (1 + 1e-12)
    if len(lists) == 1:
        return [max(_fits(costs[0], spare), least[0])]
    # however many of the first list, the longest prefix of the other that fits beside it
    rest = torch.searchsorted(costs[1], spare - costs[0], right=True) - 1
    fit = rest >= least[1]
    fit[: least[0]] = False
    if not bool(fit.any()):
        return list(least)
    scores = torch.where(fit, sums[0] + sums[1][rest.clamp(min=0)], -torch.inf)
    # the first of equal ones, which argmax does not promise
    count = int((scores == scores.max()).nonzero()[0])
    return [count, int(rest[count])]


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _fits(costs: Tensor, room: float) -> int:
    """The longest prefix whose cost is `room` or less; -1 if none is."""
    return int(torch.searchsorted(costs, room, right=True)) - 1


KWON = Allocation("kwon", wanted, survey="scores", equal=False)

"""besa: the widths with the least sum of errors of layers' outputs that the budget allows.

What each layer loses at a grid of rates, and how its Sites best share each, is learned before
(`survey.besa`, arXiv 2402.16880). Between layers the budget goes where the next unit costs least:
of all choices of one level for each layer the best one is found exactly, as for `levels`.
"""

from __future__ import annotations

from collections.abc import Sequence

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.levels import choose


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    layers: list[Sequence[Budget]] = []
    while (done := sum(map(len, layers))) < len(budgets):
        # Sites of a layer follow each other, and each has the finding of all of them
        sites = budgets[done].known.shape[1] - 1
        layers.append(budgets[done : done + sites])
    kept = [layer[0].known[:, 1:].long().tolist() for layer in layers]
    costs = [
        [sum(b.price(n) for n, b in zip(level, layer, strict=True)) for level in own]
        for layer, own in zip(layers, kept, strict=True)
    ]
    most = sum(b.price(b.units) for b in budgets) * (1 - sparsity)
    chosen = choose(costs, [layer[0].known[:, 0].tolist() for layer in layers], most)
    return [float(n) for own, level in zip(kept, chosen, strict=True) for n in own[level]]


BESA = Allocation("besa", wanted, survey="besa", equal=False, prices=True)

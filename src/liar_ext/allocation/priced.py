"""A budget in prices that are not in proportion to units, for allocations that count units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liar_ext.allocation.base import Budget

# the range of sparsities that is left in the end, as a share of one unit
FINEST = 1e-3


def asked(
    wanted: Callable[[Sequence[Budget], float], list[float]],
    budgets: Sequence[Budget],
    sparsity: float,
) -> list[float]:
    """What `wanted` answers at that sparsity of its own at which the price is met.

    An allocation that takes every unit of a Site to cost the same is asked for more or less than
    `sparsity`, by bisection, until what it answers costs `1 − sparsity` of the dense price, or as
    little below as its answers allow. Some never answer fewer than the units that come for the
    fixed price (`ranking`): where even these cost too much, the same share of them goes in every
    Site.

    Args:
        budgets: of which one unit each fits, as the caller has seen (`check_reachable`).
    """
    most = (1 - sparsity) * sum(b.price(b.units) for b in budgets)

    def fits(widths: Sequence[float]) -> bool:
        total = sum(b.price(w) for b, w in zip(budgets, widths, strict=True))
        return total <= most * (1 + 1e-12)

    least = wanted(budgets, 1.0)

    def beyond(share: float) -> list[float]:
        return [1 + (units - 1) * (1 - share) for units in least]

    answer = partial(wanted, budgets) if fits(least) else beyond
    low, high, found = 0.0, 1.0, answer(1.0)
    finest = FINEST / sum(b.units for b in budgets)
    while high - low > finest:
        middle = (low + high) / 2
        widths = answer(middle)
        if fits(widths):
            high, found = middle, widths
        else:
            low = middle
    return found

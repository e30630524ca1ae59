"""ranked: all units of a kind in one ranking by raw score, and each kind loses the same share.

FLAP's AL-MM (arXiv 2312.11983) without its standardisation of each layer's scores: what is compared
across layers are the criterion's scores as they are, summed over a unit. Units of one kind cost the
same where their layers have the same widths; where they do not, the units that are kept are the
longest prefix of the ranking that is nearest to the kind's budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from liar_ext.allocation.base import Allocation, Budget
from liar_ext.allocation.ranking import nearest


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    kept = [0.0] * len(budgets)
    for kind in dict.fromkeys(budget.kind for budget in budgets):
        places = [place for place, budget in enumerate(budgets) if budget.kind == kind]
        units = nearest([budgets[place] for place in places], sparsity)
        for place, count in zip(places, units, strict=True):
            kept[place] = count
    return kept


RANKED = Allocation("ranked", wanted, survey="scores", equal=False)

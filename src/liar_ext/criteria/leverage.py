"""leverage: ridge leverage scores of the columns, `[C (C + λI)⁻¹]_jj` (MoDeGPT, arXiv 2408.09632).

The weights do not enter: a column is worth what the others cannot say of it.
"""

import dataclasses

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence
from liar_ext.criteria.obs import inverse
from liar_ext.ops.inverse import inverse_bytes, inverse_flops

# without a ridge every column has a leverage of 1
_LEAST_RIDGE = 1e-4


def score(evidence: Evidence) -> Tensor:
    ridge = max(evidence.ridge, _LEAST_RIDGE)
    found = inverse(dataclasses.replace(evidence, ridge=ridge))
    scores = (1.0 - found.strength * found.theta.diagonal()).clamp(min=0.0)
    # what never changes says nothing; its rows of the inverse are the identity's
    return scores.masked_fill(found.dead, 0.0)


LEVERAGE = Criterion(
    "leverage",
    score,
    needs="moments",
    flops=lambda columns, outputs, dropped: inverse_flops(columns),
    holds=lambda columns, outputs, dropped: inverse_bytes(columns),
)

"""random: uniform scores from the recipe's seed; the floor any criterion must beat."""

import torch
from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    drawn = torch.rand(evidence.site.units, generator=evidence.generator, dtype=torch.float64)
    return drawn.to(evidence.site.weight().device)


RANDOM = Criterion("random", score, needs="weights")

"""random: uniform scores from the recipe's seed; the floor any criterion must beat."""

import torch
from torch import Tensor

from liar_ext.criteria.base import Columns, Criterion
from liar_ext.models.site import Site


def score(site: Site, statistics: Columns, generator: torch.Generator) -> Tensor:
    return torch.rand(site.units, generator=generator, dtype=torch.float64).to(site.weight().device)


RANDOM = Criterion("random", score)

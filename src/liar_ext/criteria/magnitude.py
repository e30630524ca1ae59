"""magnitude: `‖W_:,j‖₂` of the consumer's column (mag-sp of FLAP's code); needs no data."""

import torch
from torch import Tensor

from liar_ext.criteria.base import Columns, Criterion
from liar_ext.models.site import Site


def score(site: Site, statistics: Columns, generator: torch.Generator) -> Tensor:
    return site.weight().double().norm(dim=0)


MAGNITUDE = Criterion("magnitude", score)

"""flap: WIFV, `Var(x_j) · ‖W_:,j‖²` (FLAP, arXiv 2312.11983, eq. 5), squared for attention.

The paper's code squares the attention metric column by column before anything else, and the
global allocation depends on it, so it is kept. The variance here is the exact one over all tokens.
"""

import torch
from torch import Tensor

from liar_ext.criteria.base import Columns, Criterion
from liar_ext.models.site import Site


def score(site: Site, statistics: Columns, generator: torch.Generator) -> Tensor:
    metric = statistics.variance() * site.weight().double().square().sum(0)
    return metric.square() if site.kind == "heads" else metric


FLAP = Criterion("flap", score)

"""wanda: `mean_i |W_ij| · √E[x_j²]` (Wanda-sp in FLAP, arXiv 2312.11983; after 2306.11695)."""

import torch
from torch import Tensor

from liar_ext.criteria.base import Columns, Criterion
from liar_ext.models.site import Site


def score(site: Site, statistics: Columns, generator: torch.Generator) -> Tensor:
    return site.weight().double().abs().mean(0) * statistics.diagonal().sqrt()


WANDA = Criterion("wanda", score)

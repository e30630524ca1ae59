"""wanda: `mean_i |W_ij| · √E[x_j²]` (Wanda-sp in FLAP, arXiv 2312.11983; after 2306.11695)."""

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    magnitudes = evidence.site.weight().double().abs().mean(0)
    return magnitudes * evidence.statistics.diagonal().sqrt()


WANDA = Criterion("wanda", score)

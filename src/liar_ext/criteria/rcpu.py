"""rcpu: `‖W_:,j‖ · √E[x_j²] · Var(x_j)`, RCPU's variance-aware score (arXiv 2510.07782)."""

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    statistics = evidence.statistics
    norms = evidence.site.weight().double().norm(dim=0)
    return norms * statistics.diagonal().sqrt() * statistics.variance()


RCPU = Criterion("rcpu", score)

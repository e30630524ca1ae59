"""snip: `|Σ_x ∂L_x/∂m_u|`, of a gate `m = 1` on each unit (SNIP, arXiv 1810.02340, on units)."""

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    return evidence.gates.sum(0).abs()


SNIP = Criterion("snip", score, needs="gradients")

"""michel: `Σ_x |∂L_x/∂m_u|`, of a gate `m = 1` on each unit (Michel et al., arXiv 1905.10650).

The paper divides by the layer's L2 norm, so that layers can be compared. Inside a Site that changes
nothing, and `global` standardises each Site's scores, which undoes it.
"""

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    return evidence.gates.abs().sum(0)


MICHEL = Criterion("michel", score, needs="gradients")

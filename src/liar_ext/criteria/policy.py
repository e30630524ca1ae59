"""policy: keep probabilities that a policy gradient has learned (arXiv 2406.10576).

They are learned by `engine.policy` before anything is pruned, see `ops.policy`. Units at exactly 0
or 1 come in the order of the probabilities that the search started from.
"""

from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence


def score(evidence: Evidence) -> Tensor:
    return evidence.probabilities


POLICY = Criterion("policy", score, needs="policy")

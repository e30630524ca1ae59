"""flap, flap-ifv, flap-wifn: FLAP's three metrics (arXiv 2312.11983, eq. 4–6), squared for heads.

    WIFV (flap)  Var(x_j) · ‖W_:,j‖²     IFV  Var(x_j)     WIFN  mean_i |W_ij| · √E[x_j²]

The paper's code squares the attention metric column by column before anything else, and the
global allocation depends on it, so it is kept. The variance here is the exact one over all tokens.
"""

from collections.abc import Callable

from torch import Tensor

from liar_ext.criteria import wanda
from liar_ext.criteria.base import Criterion, Evidence


def _squared(metric: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
    def score(evidence: Evidence) -> Tensor:
        found = metric(evidence)
        return found.square() if evidence.site.kind == "heads" else found

    return score


def _wifv(evidence: Evidence) -> Tensor:
    return evidence.statistics.variance() * evidence.site.weight().double().square().sum(0)


FLAP = Criterion("flap", _squared(_wifv))
FLAP_IFV = Criterion("flap-ifv", _squared(lambda evidence: evidence.statistics.variance()))
FLAP_WIFN = Criterion("flap-wifn", _squared(wanda.score))

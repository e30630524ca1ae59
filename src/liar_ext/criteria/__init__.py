"""Criteria by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.criteria.base import Columns, Criterion, Evidence, Prior, unit_scores
from liar_ext.criteria.fisher import FISHER, FISHER_REARRANGED
from liar_ext.criteria.flap import FLAP, FLAP_IFV, FLAP_WIFN
from liar_ext.criteria.leverage import LEVERAGE
from liar_ext.criteria.magnitude import MAGNITUDES
from liar_ext.criteria.michel import MICHEL
from liar_ext.criteria.obs import OBS, OBS_SWAP
from liar_ext.criteria.policy import POLICY
from liar_ext.criteria.random import RANDOM
from liar_ext.criteria.rcpu import RCPU
from liar_ext.criteria.snip import SNIP
from liar_ext.criteria.taylor import TAYLORS
from liar_ext.criteria.wanda import WANDA

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        *MAGNITUDES,
        WANDA,
        FLAP,
        FLAP_IFV,
        FLAP_WIFN,
        RCPU,
        LEVERAGE,
        OBS,
        OBS_SWAP,
        SNIP,
        MICHEL,
        FISHER,
        FISHER_REARRANGED,
        *TAYLORS,
        POLICY,
        RANDOM,
    )
}

__all__ = ["CRITERIA", "Columns", "Criterion", "Evidence", "Prior", "unit_scores"]

"""obs: keep what a repair cannot stand in for (ZipLM, arXiv 2302.04089; OSSCAR, 2403.12983).

A unit's score is what its removal adds to `tr(W_M Θ_MM⁻¹ W_Mᵀ)`, the error that is left after the
least-squares repair, when it goes (`ops.removal`). `obs-swap` then exchanges units.
"""

import dataclasses

import torch
from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence
from liar_ext.errors import NumericalError
from liar_ext.ops.interpolate import Inverse, inverse_moments
from liar_ext.ops.removal import Tableau, removal_bytes, removal_flops
from liar_ext.ops.solve import LADDER_STEPS, LARGEST_RIDGE

# what a ridge of 0 is raised to where the Moments have no inverse
_FIRST_RIDGE = 1e-8
# of the units that stay or go, whichever are fewer: those that the first exchange moves
_EXCHANGED = 16


def inverse(evidence: Evidence) -> Inverse:
    """`(C + λI)⁻¹` with the ridge of the repair, or the next higher one that has an inverse.

    Raises:
        NumericalError: there is none.
    """
    ridge = evidence.ridge
    for _ in range(LADDER_STEPS):
        try:
            return inverse_moments(evidence.moments, ridge=ridge, center=evidence.center)
        except NumericalError as error:
            ridge = max(10 * ridge, _FIRST_RIDGE)
            if ridge > LARGEST_RIDGE:
                break
            evidence.notes.append(f"selection: {error}: ridge {ridge:.1e}")
    raise NumericalError(f"{evidence.site.name}: the Moments have no inverse with any ridge")


def tableau(evidence: Evidence) -> Tableau:
    """All units kept."""
    site, moments = evidence.site, evidence.moments
    found = inverse(evidence)
    # a column that never changes costs nothing, whatever its weights
    alive = (moments.variance() if evidence.center else moments.diagonal()) > 0
    return Tableau(found.theta, site.weight().double() * alive, site.columns_per_unit)


def score(evidence: Evidence) -> Tensor:
    found = tableau(evidence)
    units = evidence.site.units
    order, costs = found.remove(units - 1)
    scores = costs.new_full((units,), torch.inf)
    scores[order] = costs
    # the last one cannot be judged: it is worth at least what the one before it was
    return torch.where(scores.isinf(), costs[-1] if len(costs) else 1.0, scores)


def choose(evidence: Evidence) -> Tensor:
    found = tableau(evidence)
    assert evidence.keep is not None
    found.remove(evidence.site.units - evidence.keep)
    return found.kept.nonzero().flatten()


def choose_and_exchange(evidence: Evidence) -> Tensor:
    found = tableau(evidence)
    assert evidence.keep is not None
    dropped = evidence.site.units - evidence.keep
    found.remove(dropped)
    before = found.loss
    if moved := found.exchange(max(1, min(dropped, evidence.keep) // _EXCHANGED)):
        gain = 1 - found.loss / before
        evidence.remarks.append(f"selection: {moved} exchanges lowered the loss by {gain:.2%}")
    return found.kept.nonzero().flatten()


OBS = Criterion(
    "obs",
    score,
    needs="moments",
    choose=choose,
    greedy=True,
    flops=removal_flops,
    holds=removal_bytes,
)
OBS_SWAP = dataclasses.replace(OBS, name="obs-swap", choose=choose_and_exchange)

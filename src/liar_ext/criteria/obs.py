"""obs: keep what a repair cannot stand in for (ZipLM, arXiv 2302.04089; OSSCAR, 2403.12983).

A unit's score is what its removal adds to `tr(W_M Θ_MM⁻¹ W_Mᵀ)`, the error that is left after the
least-squares repair, when it goes (`ops.removal`). `obs-swap` then exchanges units.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from liar_ext.criteria.base import Criterion, Evidence
from liar_ext.errors import NumericalError
from liar_ext.ops.interpolate import Inverse, inverse_moments
from liar_ext.ops.ladder import LADDER_STEPS, LARGEST_RIDGE
from liar_ext.ops.removal import STEPS, Tableau, removal_bytes, removal_flops

# what a ridge of 0 is raised to where the Moments have no inverse
_FIRST_RIDGE = 1e-8
# of the units that stay or go, whichever are fewer: those that the first exchange moves
_EXCHANGED = 16

Made = TypeVar("Made")


def climbing(evidence: Evidence, make: Callable[[float], Made]) -> Made:
    """What is made with the ridge of the repair, or the next higher one that is enough for it.

    Raises:
        NumericalError: none is; it names the Site.
    """
    ridge = evidence.ridge
    for _ in range(LADDER_STEPS):
        try:
            return make(ridge)
        except NumericalError as error:
            last, ridge = error, max(10 * ridge, _FIRST_RIDGE)
            if ridge > LARGEST_RIDGE:
                break
            evidence.notes.append(f"selection: {error}: ridge {ridge:.1e}")
    raise NumericalError(f"{evidence.site.name}: no ridge is enough for a selection: {last}")


def inverse(evidence: Evidence) -> Inverse:
    """`(C + λI)⁻¹`.

    Raises:
        NumericalError: there is none.
    """

    def make(ridge: float) -> Inverse:
        return inverse_moments(evidence.moments, ridge=ridge, center=evidence.center)

    return climbing(evidence, make)


def removing(evidence: Evidence, work: Callable[[Tableau], Made]) -> Made:
    """What `work` makes of a tableau with all units kept.

    Pivots on a matrix whose inverse was just good enough can lose it on the way; then all of the
    work is done again with more ridge.

    Raises:
        NumericalError: no ridge is enough.
    """
    site, moments = evidence.site, evidence.moments

    def make(ridge: float) -> Made:
        found = inverse_moments(moments, ridge=ridge, center=evidence.center)
        return work(Tableau(found.theta, site.weight(), site.columns_per_unit, found.dead))

    return climbing(evidence, make)


def score(evidence: Evidence) -> Tensor:
    units = evidence.site.units
    order, costs = removing(evidence, lambda found: found.remove(units - 1))
    # the last one cannot be judged: it is worth at least what the one before it was
    rising = _rising(torch.cat([costs, costs[-1:] if units > 1 else costs.new_ones(1)]))
    scores = rising[-1:].repeat(units)
    scores[order] = rising[:-1]
    return scores


def _rising(costs: Tensor) -> Tensor:
    """Costs that never fall, those that are equal told apart by as little as float64 can.

    What went later stands higher: where costs are made to rise their order would be lost.
    """
    place = torch.arange(len(costs), device=costs.device)
    # bits of numbers from 0 on are in the order of the numbers
    bits = costs.clamp(min=0).view(torch.int64)
    return ((bits - place).cummax(0).values + place).view(torch.float64)


def choose(evidence: Evidence) -> Tensor:
    def work(found: Tableau) -> Tensor:
        found.remove(_dropped(evidence))
        return found.kept.nonzero().flatten()

    return removing(evidence, work)


def choose_and_exchange(evidence: Evidence) -> Tensor:
    dropped = _dropped(evidence)

    def work(found: Tableau) -> Tensor:
        found.remove(dropped)
        before = found.loss
        stay = evidence.site.units - dropped
        if moved := found.exchange(_most(dropped, stay)):
            gain = 1 - found.loss / before
            evidence.remarks.append(f"selection: {moved} exchanges lowered the loss by {gain:.2%}")
        return found.kept.nonzero().flatten()

    return removing(evidence, work)


def descend(evidence: Evidence, widths: Sequence[int], exchange: bool = False) -> list[Tensor]:
    """What stays at each of several widths, from one removal; the widest first."""
    units = evidence.site.units

    def work(found: Tableau) -> list[Tensor]:
        kept, before = [], units
        for after in widths:
            # as many steps for all of them as for one
            found.remove(before - after, steps=-(-STEPS * (before - after) // units))
            if exchange:
                found.exchange(_most(units - after, after))
            kept.append(found.kept.nonzero().flatten())
            before = after
        return kept

    return removing(evidence, work)


def _most(dropped: int, stay: int) -> int:
    """Units that the first exchange moves."""
    return max(1, min(dropped, stay) // _EXCHANGED)


def _dropped(evidence: Evidence) -> int:
    assert evidence.keep is not None, "a choice is of so many units"
    return evidence.site.units - evidence.keep


OBS = Criterion(
    "obs",
    score,
    needs="moments",
    choose=choose,
    descend=descend,
    greedy=True,
    flops=removal_flops,
    holds=removal_bytes,
)
OBS_SWAP = dataclasses.replace(
    OBS,
    name="obs-swap",
    choose=choose_and_exchange,
    descend=partial(descend, exchange=True),
)

"""levels: what a least-squares repair leaves of a Site's output at a grid of widths.

    loss(M) / tr(W C Wᵀ)        loss(M) = tr(W_M Θ_MM⁻¹ W_Mᵀ), Θ = (C + λI)⁻¹  (`ops.removal`)

ZipLM's database of levels (arXiv 2302.04089) without its copies of the weights. Units go in the
order of the criterion; a criterion that removes greedily goes on from what it has removed.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from liar_ext.allocation.levels import levels
from liar_ext.criteria import Criterion, Evidence, unit_scores
from liar_ext.criteria.obs import removing
from liar_ext.models.site import Site
from liar_ext.ops.moments import Moments, spans
from liar_ext.ops.removal import STEPS, Tableau, removal_bytes, removal_flops
from liar_ext.survey.base import Reads, Survey, View


def energy(moments: Moments, weight: Tensor, center: bool) -> float:
    """`tr(W C Wᵀ)` in float64, with `G/N` for C without `center`."""
    weight = weight.detach().double()
    every = torch.arange(moments.columns, device=weight.device)
    mean, total = moments.mean(), weight.new_zeros(())
    for start, stop in spans(0, moments.columns):
        product = weight @ moments.second(every, every[start:stop])
        if center:
            product -= torch.outer(weight @ mean, mean[start:stop])
        total += (product * weight[:, start:stop]).sum()
    return max(float(total), torch.finfo(torch.float64).tiny)


def reads(criterion: Criterion) -> Reads:
    return "moments"


def measure(view: View) -> Tensor:
    """(levels,): relative error at each width of `allocation.levels`, ascending; the last is 0.

    Raises:
        NumericalError: the Moments have no inverse with any ridge, or lose it on the way.
    """
    evidence, site = view.evidence, view.site
    order = None if view.criterion.greedy else _order(view.criterion, evidence)
    losses = removing(evidence, lambda start: _losses(start, order, levels(site.units)))
    found = torch.tensor(losses[::-1], dtype=torch.float64)
    return found / energy(evidence.moments, site.weight(), evidence.center)


def _order(criterion: Criterion, evidence: Evidence) -> Tensor:
    """Units as they go, equal scores as `Criterion.select` takes them."""
    scores = unit_scores(evidence.site, criterion.score(evidence))
    return scores.argsort(descending=True, stable=True).flip(0)


def _losses(found: Tableau, order: Tensor | None, widths: list[int]) -> list[float]:
    """At each width from the dense one down; without an order units go greedily."""
    units = widths[-1]
    losses = [0.0]
    for before, after in pairwise(reversed(widths)):
        if order is None:
            found.remove(before - after, steps=-(-STEPS * (before - after) // units))
        else:
            found.move(order[units - before : units - after])
        losses.append(found.loss)
    return losses


def costs(site: Site, criterion: Criterion) -> tuple[int, int]:
    n, outputs = site.columns, site.weight().shape[0]
    # beside the removal, the energy
    return removal_flops(n, outputs, n) + 2 * outputs * n * n, removal_bytes(n, outputs, n)


LEVELS = Survey("levels", "measuring levels", reads, measure, whole_layer=False, costs=costs)

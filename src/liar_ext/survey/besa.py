"""besa: how much of a layer's output goes at a grid of rates, and how its Sites best share each.

BESA (arXiv 2402.16880) on units. For each Site and rate there are logits θ over candidate removal
rates p_d = 0, 0.01, …, 1; with β = softmax(θ) the Site's rate is α = Σ_d β_d p_d, and with units in
the order of the criterion's score, the worst one first, the unit of rank k goes with probability

    P_k = Σ_{d: ⌊C p_d⌋ > k} β_d

The forward removes the ⌊C α⌋ worst units, the backward sees gates 1 − P_k (straight-through). With
E the error of the layer's output (`engine.block`), E_0 that of the same rate p in each Site, θ goes
down

    E / E_0 + 5 ((ᾱ − p) / p)²        ᾱ = Σ_s w_s Σ_d β_sd ⌊C_s p_d⌋ / C_s

with w_s the Site's share of the layer's cost: ᾱ is what goes of that, as one unit of a Site stays
and `⌊C p_d⌋` of few units is far from `C p_d`; the published one is of the rates.

The published β = softmax(sigmoid(θ)) keeps α between 0.38 and 0.62 whatever θ is, and starts from
0.5; here β is the softmax itself, and starts from the distribution of the largest entropy whose
mean is p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liar_ext.criteria import Criterion, unit_scores
from liar_ext.survey.base import Block, Reads, Survey, View
from liar_ext.survey.scores import costs

# p_d
CANDIDATES = torch.arange(101, dtype=torch.float64) / 100
# rates of a layer at which its error is measured, each Site with the same one
EVEN = tuple(step / 16 for step in range(1, 16))
# and those at which its Sites learn to share
LEARNED = tuple(step / 8 for step in range(1, 8))
STEPS = 32
# of Adam; falls to zero
STEP_SIZE = 0.6
# of the penalty, as published
BALANCE = 5.0


def removed(units: int, rates: Tensor) -> Tensor:
    """⌊C p⌋ units, but never all of them; of any shape, int64."""
    # a rate of 0.29 is 28.999999999999996 of 100 units
    return (units * rates + 1e-9).floor().long().clamp(max=units - 1)


def soft_gates(beta: Tensor, units: int) -> Tensor:
    """`1 − P_k` of ranks 0 to C − 1, the worst unit first.

    Args:
        beta: (..., candidates) float64, sums of one.
    Returns:
        (..., units).
    """
    counts = removed(units, CANDIDATES)
    # the share of candidates that remove k units or fewer
    gone = counts[:, None] > torch.arange(units)
    return 1 - beta @ gone.to(beta)


def starting(rates: Tensor) -> Tensor:
    """Logits of the largest entropy with `Σ β_d p_d` as given: linear in p_d.

    Args:
        rates: any shape, float64, between 0 and 1.
    Returns:
        (..., candidates).
    """
    low, high = torch.full_like(rates, -1e4), torch.full_like(rates, 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        below = _rate(middle[..., None] * CANDIDATES) < rates
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2)[..., None] * CANDIDATES


def _rate(theta: Tensor) -> Tensor:
    """α of logits (..., candidates)."""
    return theta.softmax(-1) @ CANDIDATES


def reads(criterion: Criterion) -> Reads:
    # a layer learns from hidden states, whatever its units are ranked by
    return "moments" if criterion.needs == "moments" else "columns"


def measure(view: View) -> Tensor:
    """Scores of the units, (units,), as they are ranked."""
    return unit_scores(view.site, view.criterion.score(view.evidence))


def learn(scores: Sequence[Tensor], block: Block) -> Tensor:
    """(levels, 1 + Sites) float64: the error of the layer's output, and kept units of each Site.

    The levels are the dense layer, `EVEN` rates, one unit in each Site, and `LEARNED` rates where
    there are several.
    """
    ranks = [_ranks(own) for own in scores]
    even = torch.tensor(EVEN, dtype=torch.float64)
    levels = [torch.zeros(1, len(ranks), dtype=torch.int64)]
    levels.append(torch.stack([removed(n, even) for n in block.units], 1))
    levels.append(torch.tensor([[n - 1 for n in block.units]]))
    errors = [0.0, *_errors(ranks, block, torch.cat(levels[1:]))]
    if len(ranks) > 1:
        known = dict(zip(EVEN, errors[1:], strict=False))
        levels.append(_learned(ranks, block, [known[rate] for rate in LEARNED]))
        errors += _errors(ranks, block, levels[-1])
    kept = torch.tensor(block.units) - torch.cat(levels)
    return torch.cat([torch.tensor(errors, dtype=torch.float64)[:, None], kept.double()], 1)


def _errors(ranks: Sequence[Tensor], block: Block, gone: Tensor) -> list[float]:
    return block.errors([_hard(ranks, own) for own in gone.tolist()])


def _learned(ranks: Sequence[Tensor], block: Block, even: Sequence[float]) -> Tensor:
    """Units of each Site that go at each of `LEARNED`, (rates, Sites) int64.

    Args:
        even: errors at these rates with the same one in each Site; 0 where nothing is lost.
    """
    rates = torch.tensor(LEARNED, dtype=torch.float64)
    scale = 1 / torch.tensor(even, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    sizes = torch.tensor([float(n * c) for n, c in zip(block.units, block.costs, strict=True)])
    shares = sizes.double() / sizes.double().sum()
    theta = starting(rates[:, None].expand(-1, len(ranks))).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=STEP_SIZE)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = STEP_SIZE * (1 - step / STEPS)
        gone = _gone(theta, block)
        # rates are at batches far from each other, which may be of other ranks
        numbers = [
            (r * block.batches // len(rates) + step) % block.batches for r in range(len(rates))
        ]
        trials = [(n, _hard(ranks, own)) for n, own in zip(numbers, gone.tolist(), strict=True)]
        slopes = [
            [own * factor for own in of]
            for of, factor in zip(block.slopes(trials), scale, strict=True)
        ]
        theta.grad = gradient(theta.detach(), slopes, ranks, rates, shares)
        optimiser.step()
    return _gone(theta, block)


def gradient(
    theta: Tensor,
    slopes: Sequence[Sequence[Tensor]],
    ranks: Sequence[Tensor],
    rates: Tensor,
    shares: Tensor,
) -> Tensor:
    """Of error and penalty with respect to the logits, the hard gates taken for the soft ones.

    Args:
        theta: (rates, Sites, candidates) float64; rates: p of each.
        slopes: ∂E/∂gate of the hard gates, (units,) for each rate and Site.
        ranks: of each Site's units; shares: of the layer's cost, (Sites,).
    """
    theta = theta.clone().requires_grad_()
    gone = torch.stack([removed(len(own), CANDIDATES).double() / len(own) for own in ranks])
    with torch.enable_grad():
        beta = theta.softmax(-1)
        mean = (beta * gone).sum(-1) @ shares
        total = BALANCE * ((mean - rates) / rates).square().sum()
        for site, own in enumerate(ranks):
            gates = soft_gates(beta[:, site], len(own))[:, own]
            total = total + (gates * torch.stack([of[site] for of in slopes])).sum()
        return torch.autograd.grad(total, theta)[0]


def _gone(theta: Tensor, block: Block) -> Tensor:
    rates = _rate(theta.detach())
    return torch.stack([removed(n, rates[:, i]) for i, n in enumerate(block.units)], 1)


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each unit, the worst one's 0; equal scores as `Criterion.select` takes them."""
    order = scores.argsort(descending=True, stable=True).flip(0)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _hard(ranks: Sequence[Tensor], gone: Sequence[int]) -> list[Tensor]:
    return [(own >= count).double() for own, count in zip(ranks, gone, strict=True)]


def passes(sites: int) -> tuple[int, int]:
    # a forward, another one's worth for what entered the consumers, and one for the outputs
    learning = 3 * STEPS * len(LEARNED) if sites > 1 else 0
    return learning, len(EVEN) + 1 + (len(LEARNED) if sites > 1 else 0)


BESA = Survey(
    "besa",
    "learning rates",
    reads,
    measure,
    whole_layer=False,
    costs=costs,
    learn=learn,
    passes=passes,
)

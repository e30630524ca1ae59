"""Keep probabilities of units, learned from losses of masked models alone (policy gradient).

Bypass Back-propagation (arXiv 2406.10576). Units stay independently, `m_u ~ Bernoulli(s_u)`. Of K
masks with losses L_k, a baseline δ that follows their mean, and ε = 1e-7,

    δ ← (1 − 1/T) δ + 1/T mean_k L_k
    g_u = 1/(K − w) Σ_k (L_k − δ) (m_ku − s_u) / √((s_u + ε)(1 − s_u + ε))

with w the weight of the present mean in δ. Its expectation is exactly

    E g_u = s_u (1 − s_u) / √((s_u + ε)(1 − s_u + ε)) · (E[L | m_u = 1] − E[L | m_u = 0])

The published divisor is K − 1, which is that for w = 1: with T = 5 and two masks it makes the
steps 1.8 times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# ε and T, as published
FLOOR = 1e-7
HORIZON = 5
# share of the first probabilities in a score: less than a search can tell apart
ORDER = 1e-6


def estimate(losses: Tensor, masks: Tensor, keep: Tensor, baseline: float, weight: float) -> Tensor:
    """g, (units,) float64.

    Args:
        losses: (K,) float64; masks: (K, units) of 0 and 1; keep: s, (units,) float64.
        baseline: δ, in which the mean of these losses has a weight of `weight`, below K.
    """
    scale = ((keep + FLOOR) * (1 - keep + FLOOR)).sqrt()
    return (losses - baseline) @ ((masks - keep) / scale) / (len(losses) - weight)


def project(keep: Tensor, most: float) -> Tensor:
    """The nearest point with `0 ≤ s ≤ 1` and `Σ s ≤ most`: `clamp(s − v, 0, 1)`.

    Args:
        keep: (units,) float64, any values; most: at least 0.
    """
    within = keep.clamp(0, 1)
    if float(within.sum()) <= most:
        return within
    low, high = 0.0, float(keep.max())
    # float64 has no more digits
    for _ in range(60):
        middle = (low + high) / 2
        if float((keep - middle).clamp(0, 1).sum()) > most:
            low = middle
        else:
            high = middle
    return (keep - high).clamp(0, 1)


def initial(scores: Tensor, share: float) -> Tensor:
    """Probabilities in the order of scores with a mean of `share`: `sigmoid(score + b)`.

    Args:
        scores: (units,) float64, standardised; share: between 0 and 1.
    """
    low, high = -100.0 - float(scores.max()), 100.0 - float(scores.min())
    for _ in range(80):
        middle = (low + high) / 2
        if float((scores + middle).sigmoid().mean()) > share:
            high = middle
        else:
            low = middle
    return (scores + low).sigmoid()


@dataclass
class Policy:
    """The state of a search for masks.

    Attributes:
        keep: s by kind of unit, (units of all layers,) float64 on the CPU.
        share: ρ, of each kind that may stay.
        baseline: δ, NaN before the first step.
        spread: mean square of the losses around it, as the baseline follows them.
        generator: what masks are drawn from.
        start: s before the first step; empty for the present one.
    """

    keep: dict[str, Tensor]
    share: float
    generator: torch.Generator
    baseline: float = float("nan")
    spread: float = float("nan")
    start: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # copies: files hold no two names of one tensor
        self.start = self.start or {kind: keep.clone() for kind, keep in self.keep.items()}

    def draw(self, masks: int) -> dict[str, Tensor]:
        """Masks of all units, by kind, (masks, units) float64."""
        return {
            kind: (
                torch.rand(masks, len(keep), generator=self.generator, dtype=torch.float64) < keep
            ).double()
            for kind, keep in self.keep.items()
        }

    def scores(self) -> dict[str, Tensor]:
        """s by kind, with what it was at the start for the order of units whose s is the same.

        The projection ends many at 0 or 1, where no mask tells any more which is better.
        """
        return {kind: keep + ORDER * self.start[kind] for kind, keep in self.keep.items()}

    def step(self, losses: Tensor, masks: Mapping[str, Tensor], size: float) -> int:
        """One step down the loss, and back to the budget; returns how many losses were usable.

        Losses that are NaN or infinite are left out with their masks. Steps are in units of the
        losses' own spread around the baseline, so that their scale does not matter.
        """
        usable = losses.isfinite()
        count = int(usable.sum())
        first = self.baseline != self.baseline
        weight = 1.0 if first else 1 / HORIZON
        if count <= weight:
            return count
        losses = losses[usable]
        mean = float(losses.mean())
        self.baseline = mean if first else (1 - weight) * self.baseline + weight * mean
        square = float((losses - self.baseline).square().mean())
        self.spread = square if first else (1 - weight) * self.spread + weight * square
        scale = max(self.spread, torch.finfo(torch.float64).tiny) ** 0.5
        for kind, keep in self.keep.items():
            slope = estimate(losses, masks[kind][usable], keep, self.baseline, weight)
            self.keep[kind] = project(keep - size / scale * slope, self.share * len(keep))
        return count

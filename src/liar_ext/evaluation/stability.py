"""Stability: how much of what a model knows, and guesses, is the same after compression.

Two models of equal accuracy may be right about different questions. Stability is the share of
questions of which both are right or both are wrong, each weighted by how decided the original model
is: by the spread of what it thinks of the options.

    σ_i = population standard deviation of the original model's scores s_ik of item i's options
    w   = softmax(σ) over the items of one set
    a_i = 1 where both models are right or both are wrong, else 0
    stability = Σ w_i a_i                                                   in [0, 1]

Source: LLM-Streamline (Chen et al., arXiv 2403.19135) and its `calculate_stability.py`. There s_ik
is the "PPL" of OpenCompass's prediction files, which is a mean loss (see `choice_scores`). With
perplexities, its exponentials, the weights fall on a few items: `effective_sample_size` says on how
many. Departures:

- the repository counts the items that agree, m, and returns w_1 + … + w_m, the weights of the first
  m items whichever they are. `legacy=True` gives that number;
- it takes exp(σ) as it is, which is infinite from σ = 710 on; softmax shifts by the largest σ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.errors import InputError


def item_weights(scores: Tensor) -> Tensor:
    """The weight of each item, (items,) float64; their sum is 1.

    Args:
        scores: (items, options), of the original model; NaN where an item has fewer options.
    Raises:
        InputError: no items, an item with fewer than two scores, or one that is not finite.
    """
    if scores.dim() != 2 or not len(scores):
        raise InputError(f"scores have shape {tuple(scores.shape)}; give (items, options)")
    scores = scores.double()
    there = ~scores.isnan()
    counts = there.sum(1)
    if int(counts.min()) < 2:
        item = int(counts.argmin())
        raise InputError(f"item {item} has {int(counts[item])} scores; a spread needs two options")
    means = scores.nansum(1) / counts
    deviations = (scores - means[:, None]).where(there, 0.0)
    spread = (deviations.square().sum(1) / counts).sqrt()
    bad = (~spread.isfinite()).nonzero().flatten()
    if bad.numel():
        item = int(bad[0])
        raise InputError(
            f"the spread of item {item} is {float(spread[item])}, its scores "
            f"{scores[item][there[item]].tolist()}; give finite scores"
        )
    return spread.softmax(0)


def effective_sample_size(weights: Tensor) -> float:
    """Kish's `1 / Σ w²` of weights whose sum is 1: equal weights of n items give n."""
    return float(1 / weights.double().square().sum())


def stability(
    dense_ppl: Tensor, dense_correct: Tensor, pruned_correct: Tensor, *, legacy: bool = False
) -> float:
    """The stability of a pruned model on one set, in [0, 1].

    Args:
        dense_ppl: (items, options), scores of the original model, see `item_weights`.
        dense_correct, pruned_correct: (items,) bool, which items a model answers right.
        legacy: the weights of the first items, as many as agree, as LLM-Streamline's repository has
            it.
    Raises:
        InputError: as `item_weights`, or a tensor is of another number of items.
    """
    weights = item_weights(dense_ppl)
    for name, correct in (("dense_correct", dense_correct), ("pruned_correct", pruned_correct)):
        if correct.shape != weights.shape or correct.dtype != torch.bool:
            raise InputError(
                f"{name} is {correct.dtype} of shape {tuple(correct.shape)}; give "
                f"{len(weights)} booleans"
            )
    agree = dense_correct == pruned_correct
    counted = weights[: int(agree.sum())] if legacy else weights[agree]
    # weights add up to 1 but for rounding
    return min(1.0, float(counted.sum()))

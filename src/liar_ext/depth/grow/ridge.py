"""A linear predictor in closed form, beside LESA's network: ridge regression on both neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# λ relative to the mean of the diagonal; the last one leaves a hundredth of what is unpredictable
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FOLDS = 4

Triple = tuple[Tensor, Tensor, Tensor]


class RidgePredictor:
    """`V_new = [V_below V_above] M`, M (2 · in, in) float64.

    Attributes:
        facts: `ridge`, the λ that was chosen; `held_out_error` by λ, relative to the energy of what
            was predicted: 1 is what predicting zero has.
    """

    def __init__(self, weights: Tensor, facts: dict[str, Any]) -> None:
        self.weights = weights
        self.facts = facts

    def __call__(self, below: Tensor, above: Tensor) -> Tensor:
        return torch.cat((below, above), 1).double() @ self.weights


def fit_ridge(coefficients: Tensor, centres: Sequence[int]) -> RidgePredictor:
    """Least squares from V_{i−1} and V_{i+1} to V_i with λ chosen on layers that were left out.

    `M = (Xᵀ X + λ m I)⁻¹ Xᵀ Y` with X (rows, 2 · in), m the mean of the diagonal of Xᵀ X. Of
    `RIDGES` the λ with the least squared error on held-out triples (at most four parts, neighbours
    together) is fitted again to all; where there is one triple only, a part is a quarter of its
    rows. Sums and solves are float64: two matrices of (2 · in)² at a time.

    Args:
        coefficients: V (layers, r, in), on the device to compute on; centres: the layers i, by
            their place there.
    """
    parts = list(_parts(coefficients, centres))
    errors = dict.fromkeys(RIDGES, 0.0)
    energy = 0.0
    for number, held_out in enumerate(parts):
        fitted = [part for other, part in enumerate(parts) if other != number]
        given, wanted = _stacked(held_out)
        energy += float(wanted.square().sum())
        for ridge, weights in _solutions(fitted, RIDGES):
            errors[ridge] += float((given @ weights - wanted).square().sum())
    best = min(RIDGES, key=lambda ridge: errors[ridge])
    ((_, weights),) = _solutions(parts, (best,))
    relative = {f"{ridge:g}": error / max(energy, 1e-300) for ridge, error in errors.items()}
    return RidgePredictor(weights, {"ridge": best, "held_out_error": relative})


def ridge_reference(given: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """M by the definition: float64 least squares of the rows with `√(λ m) I` and 0 below them."""
    given, wanted = given.double(), wanted.double()
    columns = given.shape[1]
    mean = given.square().sum() / columns
    prior = (ridge * mean).sqrt() * torch.eye(columns, dtype=torch.float64)
    zero = torch.zeros(columns, wanted.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat((given, prior)), torch.cat((wanted, zero))).solution


def _parts(coefficients: Tensor, centres: Sequence[int]) -> Iterator[list[Triple]]:
    """V_{i−1}, V_{i+1}, V_i of the triples of each part that is held out once."""
    triples = [(coefficients[i - 1], coefficients[i + 1], coefficients[i]) for i in sorted(centres)]
    if len(triples) == 1:
        below, above, centre = triples[0]
        for number in range(FOLDS):
            rows = slice(number, None, FOLDS)
            yield [(below[rows], above[rows], centre[rows])]
        return
    count = min(FOLDS, len(triples))
    bounds = [len(triples) * number // count for number in range(count + 1)]
    for start, stop in pairwise(bounds):
        yield triples[start:stop]


def _stacked(part: Sequence[Triple]) -> tuple[Tensor, Tensor]:
    given = [torch.cat((below, above), 1) for below, above, _ in part]
    return torch.cat(given).double(), torch.cat([centre for *_, centre in part]).double()


def _solutions(
    parts: Sequence[Sequence[Triple]], ridges: Sequence[float]
) -> Iterator[tuple[float, Tensor]]:
    """M fitted to these parts, by λ."""
    width = parts[0][0][0].shape[1]
    device = parts[0][0][0].device
    square = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=device)
    cross = torch.zeros(2 * width, width, dtype=torch.float64, device=device)
    for part in parts:
        for triple in part:
            given, wanted = _stacked([triple])
            square.addmm_(given.T, given)
            cross.addmm_(given.T, wanted)
    diagonal = square.diagonal()
    mean = diagonal.mean().item()
    before = 0.0
    for ridge in ridges:
        if mean == 0:
            # nothing was given, as where a single row is held out: nothing is predicted
            yield ridge, torch.zeros_like(cross)
            continue
        diagonal += ridge * mean - before
        before = ridge * mean
        yield ridge, torch.cholesky_solve(cross, torch.linalg.cholesky(square))

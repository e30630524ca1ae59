"""GLUE's metrics with what each example does to them, × 100.

From a confusion matrix (accuracy, F1 of the second label, Matthews' correlation) or from two
rankings. Without an example of one cell, all figures of that cell's examples are the same, so a
jackknife costs as many evaluations as there are cells.

Definitions: those of scikit-learn's `f1_score` and `matthews_corrcoef` and of SciPy's `pearsonr`
and `spearmanr`, which GLUE's own metric code calls; 0 where a denominator is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from liar_ext.errors import InputError
from liar_ext.evaluation.estimate import Estimate, jackknife, share
from liar_ext.evaluation.stsb import leave_one_out, rank_correlation

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array = np.ndarray


def accuracy(labels: Array, guessed: Array) -> Estimate:
    """Share of examples whose label is guessed, percent."""
    return share(labels == guessed, "examples")


def f1(labels: Array, guessed: Array) -> Estimate:
    """F1 of label 1, × 100."""
    return _of_cells(labels, guessed, _f1)


def matthews(labels: Array, guessed: Array) -> Estimate:
    """Matthews' correlation of two labels, × 100."""
    return _of_cells(labels, guessed, _matthews)


def pearson(scores: Array, guessed: Array) -> Estimate:
    """Pearson's correlation, × 100."""
    x, y = (np.asarray(one, dtype=np.float64) for one in (scores, guessed))
    value = _pearson(x, y)
    if value is None:
        raise _undefined()
    # sums without each pair in turn, from centred values
    x, y, n = x - x.mean(), y - y.mean(), len(x)
    left = n - 1
    mx, my = -x / left, -y / left
    xy = (x @ y - x * y) - left * mx * my
    xx, yy = (x @ x - x * x) - left * mx * mx, (y @ y - y * y) - left * my * my
    with np.errstate(invalid="ignore", divide="ignore"):
        without = np.where((xx > 0) & (yy > 0), xy / np.sqrt(xx * yy), 0.0)
    return jackknife(100 * value, 100 * without, "examples")


def spearman(scores: Array, guessed: Array) -> Estimate:
    """Spearman's rank correlation, × 100."""
    value = rank_correlation(guessed, scores)
    if value is None:
        raise _undefined()
    return jackknife(100 * value, 100 * leave_one_out(guessed, scores), "examples")


ESTIMATES: dict[str, Callable[[Any, Any], Estimate]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _of_cells(labels: Array, guessed: Array, figure: Callable[[Array], float]) -> Estimate:
    """A figure of a 2 × 2 confusion matrix, [label, guessed]."""
    cells = 2 * labels + guessed
    counts: NDArray[np.int64] = np.bincount(cells, minlength=4).reshape(2, 2)
    without = np.zeros(4)
    for cell in np.unique(cells):
        fewer = counts.copy()
        fewer.flat[cell] -= 1
        without[cell] = figure(fewer)
    return jackknife(100 * figure(counts), 100 * without[cells], "examples")


def _f1(counts: Array) -> float:
    (_, wrong), (missed, right) = counts.tolist()
    total = 2 * right + wrong + missed
    return 2 * right / total if total else 0.0


def _matthews(counts: Array) -> float:
    (a, b), (c, d) = counts.tolist()
    scale = (a + b) * (c + d) * (a + c) * (b + d)
    return (a * d - b * c) / math.sqrt(scale) if scale else 0.0


def _pearson(x: Array, y: Array) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else None


def _undefined() -> InputError:
    return InputError(
        "all scores or all predictions are equal, so a correlation is not defined; give examples "
        "with different scores"
    )

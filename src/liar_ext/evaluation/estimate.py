"""Estimates: a figure, how certain it is, and how certain its difference from another one is.

Every figure comes with one number for each *unit* that it was measured on (a window of text, a
question, a pair of sentences): its pseudo-values `u_i = n θ − (n − 1) θ_(−i)`, θ_(−i) being the
figure without unit i. Of a mean they are the values themselves. So one rule serves all figures:

    standard error = std(u) / √n,      paired standard error of B − A = std(u_B − u_A) / √n

Source: Tukey's pseudo-values of the jackknife (Miller, The jackknife - a review, 1974).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from liar_ext.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
# exp of more is infinite
_LARGEST_LOSS = 700.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Figure:
    """A number and how certain it is.

    Attributes:
        value: the figure.
        standard_error: of `value`; None for a single unit.
        interval: two-sided, of `LEVEL`; None for a single unit.
        method: how the interval is made, for people.
    """

    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    method: str

    def to_json(self) -> dict[str, Any]:
        error, interval = self.standard_error, self.interval
        # of losses of hundreds, squares are infinite: nothing is known of such errors
        if error is not None and not math.isfinite(error):
            error = None
        if interval is not None and not all(map(math.isfinite, interval)):
            interval = None
        return {
            "value": self.value,
            "standard_error": error,
            "confidence_interval": None if interval is None else list(interval),
            "interval_method": self.method,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Estimate(Figure):
    """A figure of one model.

    Attributes:
        units: (n,) float64, its pseudo-values, in the figure's own unit.
        share_of: of a share, what each unit that counts is worth; None of other figures.
    """

    units: NDArray[np.float64]
    share_of: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Difference(Figure):
    """One figure minus another; `paired`: on the same units."""

    paired: bool

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "paired": self.paired}


def mean(values: ArrayLike, unit: str, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The mean of the units' values, with Student's interval.

    Args:
        unit: their name in the plural; low, high: what no such mean is beyond, nor the interval.
    """
    units = np.asarray(values, dtype=np.float64)
    value = float(units.mean())
    error = _standard_error(units)
    interval = _student(value, error, len(units) - 1)
    method = f"{_percent()} Student's t over {unit}"
    if interval is not None and (interval[0] < low or interval[1] > high):
        interval = max(interval[0], low), min(interval[1], high)
        method += (
            f", cut to {low:g} and more" if high == math.inf else f", cut to {low:g}..{high:g}"
        )
    return _estimate(value, units, error, interval, method)


def perplexity(losses: ArrayLike, unit: str = "windows") -> Estimate:
    """`exp` of the mean of windows' losses (n,), or those of other units, in nats a token.

    The error of the mean loss carries to the perplexity as a factor; the interval is `exp` of the
    mean loss's, so it is not symmetric. Beyond a loss of 700, a perplexity is that of 700.
    """
    of_loss = mean(losses, unit)
    value = _exp(of_loss.value)
    units = value * (1 + of_loss.units - of_loss.value)
    error = None if of_loss.standard_error is None else value * of_loss.standard_error
    interval = None
    if of_loss.interval is not None:
        interval = (_exp(of_loss.interval[0]), _exp(of_loss.interval[1]))
    return _estimate(value, units, error, interval, f"exp of {of_loss.method}")


def share(correct: ArrayLike, unit: str = "questions", scale: float = 100.0) -> Estimate:
    """The percentage of `correct` (n,) booleans, with Wilson's score interval, which neither leaves
    0 to 100 nor shrinks to nothing where all are right. `scale` 1 is for a share of 1."""
    units = scale * np.asarray(correct, dtype=np.float64)
    count, value = len(units), float(units.mean())
    z = normal_quantile()
    p, shrink = value / scale, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / shrink
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / shrink
    interval = (scale * max(middle - half, 0.0), scale * min(middle + half, 1.0))
    method = f"{_percent()} Wilson score over {unit}"
    found = _estimate(value, units, _standard_error(units), interval, method)
    return replace(found, share_of=scale)


def jackknife(value: float, without: ArrayLike, unit: str) -> Estimate:
    """Any figure of which the values without each of the units in turn, (n,), are known.

    The normal interval is cut at nothing: that of a correlation near 1 may end above it.
    """
    left_out = np.asarray(without, dtype=np.float64)
    count = len(left_out)
    units = count * value - (count - 1) * left_out
    error = _standard_error(units)
    interval = _student(value, error, count - 1)
    return _estimate(
        value, units, error, interval, f"{_percent()} Student's t, jackknife over {unit}"
    )


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures of different units, each figure weighing the same.

    One of unit i of figure k is `θ + n / (K n_k) · (u_i − θ_k)`: their mean is that of the figures,
    and their error that of independent figures.
    """
    value = sum(one.value for one in estimates) / len(estimates)
    total = sum(len(one.units) for one in estimates)
    parts = [
        value + total / (len(estimates) * len(one.units)) * (one.units - one.units.mean())
        for one in estimates
    ]
    units = np.concatenate(parts)
    errors = [one.standard_error for one in estimates]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    method = f"{_percent()} normal, of independent figures"
    return _estimate(value, units, error, _normal(value, error), method)


def stated(value: float, error: float | None, source: str) -> Estimate:
    """A figure whose error is known and whose units are not: nothing can be paired with it."""
    method = f"{_percent()} normal, with {source}"
    return _estimate(value, np.empty(0), error, _normal(value, error), method)


def difference(dense: Estimate, pruned: Estimate, unit: str, paired: bool = True) -> Difference:
    """`pruned − dense`.

    Args:
        paired: both are of the same units in the same order; else their errors are independent.
    Raises:
        InputError: paired estimates of different numbers of units.
    """
    value = pruned.value - dense.value
    if not (paired and len(dense.units) and len(pruned.units)):
        errors = (dense.standard_error, pruned.standard_error)
        known = [error for error in errors if error is not None]
        error = math.hypot(*known) if len(known) == 2 else None
        interval = _normal(value, error)
        method = f"{_percent()} normal, unpaired"
        return Difference(
            value=value, standard_error=error, interval=interval, method=method, paired=False
        )
    if len(dense.units) != len(pruned.units):
        raise InputError(
            f"{len(dense.units)} and {len(pruned.units)} {unit} are no pairs; measure both models "
            "on the same"
        )
    error = _standard_error(pruned.units - dense.units)
    interval = _student(value, error, len(dense.units) - 1)
    method = f"{_percent()} Student's t over pairs of {unit}"
    if dense.share_of is not None and dense.share_of == pruned.share_of:
        interval = _of_paired_shares(dense.units, pruned.units, dense.share_of)
        method = f"{_percent()} Agresti-Min over pairs of {unit}"
    return Difference(
        value=value, standard_error=error, interval=interval, method=method, paired=True
    )


def _of_paired_shares(
    dense: NDArray[np.float64], pruned: NDArray[np.float64], scale: float
) -> tuple[float, float]:
    """Wald's interval with half a pair more in each of the four cells: where no pair differs, it
    is not of no width.

    Source: Agresti and Min, Statistics in Medicine 24 (2005) 729.
    """
    count = len(dense) + 2
    lost = (int(((dense > 0) & (pruned == 0)).sum()) + 0.5) / count
    won = (int(((dense == 0) & (pruned > 0)).sum()) + 0.5) / count
    middle = won - lost
    half = normal_quantile() * math.sqrt((won + lost - middle * middle) / count)
    return scale * max(middle - half, -1.0), scale * min(middle + half, 1.0)


def normal_quantile() -> float:
    """Half the width of an interval of `LEVEL`, in standard errors."""
    return NormalDist().inv_cdf(0.5 + LEVEL / 2)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom; from 3 on the expansion 26.7.5 of Abramowitz and Stegun
    (1964), to within 0.2 % for probabilities from 0.025 to 0.975.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        centred = 2 * probability - 1
        return centred * math.sqrt(2 / (1 - centred**2))
    z = NormalDist().inv_cdf(probability)
    terms: Sequence[tuple[Sequence[float], float]] = (
        ((1, 1), 4),
        ((5, 16, 3), 96),
        ((3, 19, 17, -15), 384),
        ((79, 776, 1482, -1920, -945), 92160),
    )
    total, power = z, 1.0
    for coefficients, denominator in terms:
        power /= freedom
        polynomial = 0.0
        for coefficient in coefficients:
            polynomial = polynomial * z * z + coefficient
        total += power * z * polynomial / denominator
    return total


def _estimate(
    value: float,
    units: NDArray[np.float64],
    error: float | None,
    interval: tuple[float, float] | None,
    method: str,
) -> Estimate:
    return Estimate(
        value=value, standard_error=error, interval=interval, method=method, units=units
    )


def _standard_error(units: NDArray[np.float64]) -> float | None:
    if len(units) < 2:
        return None
    return float(units.std(ddof=1) / math.sqrt(len(units)))


def _normal(value: float, error: float | None) -> tuple[float, float] | None:
    if error is None:
        return None
    half = normal_quantile() * error
    return value - half, value + half


def _student(value: float, error: float | None, freedom: int) -> tuple[float, float] | None:
    if error is None or freedom < 1:
        return None
    half = student_quantile(0.5 + LEVEL / 2, freedom) * error
    return value - half, value + half


def _exp(loss: float) -> float:
    return math.exp(min(loss, _LARGEST_LOSS))


def _percent() -> str:
    return f"{100 * LEVEL:g} %"

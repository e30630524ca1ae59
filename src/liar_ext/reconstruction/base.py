"""Reconstruction: repairs the consumer after Selection, from Moments alone.

Those that fit weights minimise `E‖W'x_S + b' − Wx‖² + λ‖W' − W_S‖²` over the W' that they allow:
the ridge means the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.drift import Drift
from liar_ext.ops.moments import Moments, spans


@dataclass(frozen=True)
class Task:
    """One consumer to repair.

    Attributes:
        moments: statistics of its input; weight: dense (out, n); keep, drop: columns S and M.
        ridge: relative λ; intercept: whether a bias may be changed or added.
        outputs: rows of the consumer, of which `weight` may be some; None if it has all.
        unit: columns of a unit; `keep` has them one unit after the other.
        drift: of the rows of `weight`, where the target is the dense path's output; None for that
            of the dense consumer on present inputs.
    """

    moments: Moments
    weight: Tensor
    keep: Tensor
    drop: Tensor
    ridge: float
    intercept: bool
    outputs: int | None = None
    unit: int = 1
    drift: Drift | None = None

    def shift(self, weight: Tensor) -> Tensor | None:
        """What a bias needs so that W' (out, |S|) has the mean output of W, or None without one."""
        if not self.intercept:
            return None
        mean = self.moments.mean()
        found = mean.new_zeros(weight.shape[0])
        for start, stop in spans(0, self.keep.numel()):
            part = self.keep[start:stop]
            found += (self.weight[:, part].double() - weight[:, start:stop]) @ mean[part]
        for start, stop in spans(0, self.drop.numel()):
            part = self.drop[start:stop]
            found += self.weight[:, part].double() @ mean[part]
        return found


@dataclass(frozen=True)
class Repaired:
    """Attributes: `weight` (out, |S|); `shift` (out,) to add to the bias, or None; how solved."""

    weight: Tensor
    shift: Tensor | None = None
    diagnostics: Diagnostics | None = None


# a relative ridge -> `(W' − W_S)ᵀ` (|S|, out) float64 of that fit; None where that ridge does not
# hold, nor do smaller ones
Fit = Callable[[float], Tensor | None]


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    name: as users write it.
    repair: Task -> Repaired.
    needs_bias: it works through the bias: `--bias never` contradicts it, and `auto` adds one.
    solves: it fits so many numbers that it needs at least as many tokens as columns.
    follows: it goes by `Task.drift`; without that `--target-signal dense` is refused.
    whole: output rows see each other: every rank repairs all of them, not a slice.
    sweep: Task, whose own ridge does not count -> fits with one ridge after another, sharing what
        does not depend on it; None for what has no ridge. A `repair` with an intercept then has the
        mean output of the dense consumer on the Moments that it is fitted to.
    holds: (kept, dropped, outputs, rows) -> most bytes that `repair` holds beside its arguments;
        rows: of the outputs, those that one rank repairs.
    flops: (kept, dropped, outputs) -> floating-point operations of `repair`.
    """

    name: str
    repair: Callable[[Task], Repaired]
    needs_bias: bool = False
    solves: bool = False
    follows: bool = False
    whole: bool = False
    sweep: Callable[[Task], Fit] | None = None
    holds: Callable[[int, int, int, int], int] = lambda kept, dropped, outputs, rows: 0
    flops: Callable[[int, int, int], int] = lambda kept, dropped, outputs: 0

    @property
    def uses_ridge(self) -> bool:
        """Whether another ridge may give another result."""
        return self.sweep is not None

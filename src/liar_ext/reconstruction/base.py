"""Reconstruction: repairs the consumer after Selection, from Moments alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.moments import Moments


@dataclass(frozen=True)
class Task:
    """One consumer to repair.

    Attributes:
        moments: statistics of its input; weight: dense (out, n); keep, drop: columns S and M.
        ridge: relative λ; intercept: whether a bias may be changed or added.
        outputs: rows of the consumer, of which `weight` may be some; None if it has all.
    """

    moments: Moments
    weight: Tensor
    keep: Tensor
    drop: Tensor
    ridge: float
    intercept: bool
    outputs: int | None = None


@dataclass(frozen=True)
class Repaired:
    """Attributes: `weight` (out, |S|); `shift` (out,) to add to the bias, or None; how solved."""

    weight: Tensor
    shift: Tensor | None = None
    diagnostics: Diagnostics | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Attributes:
    name: as users write it.
    repair: Task -> Repaired.
    needs_bias: it works through the bias: `--bias never` contradicts it, and `auto` adds one.
    solves: it fits weights, so it needs at least as many tokens as columns.
    uses_ridge: another ridge may give another result; `liar compare` computes cells once that
        differ in what does not matter.
    """

    name: str
    repair: Callable[[Task], Repaired]
    needs_bias: bool = False
    solves: bool = False
    uses_ridge: bool = True

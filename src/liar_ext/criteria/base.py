"""Criterion: scores the units of a Site; high means keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from liar_ext.models.site import Site
from liar_ext.ops.moments import Moments


class Columns(Protocol):
    """What a criterion may ask of the statistics: `Moments` and `ColumnMoments` both answer."""

    def mean(self) -> Tensor: ...
    def diagonal(self) -> Tensor: ...
    def variance(self) -> Tensor: ...


@dataclass(frozen=True)
class Evidence:
    """What a criterion judges one Site by.

    Attributes:
        site: the Site, dense; statistics: of its columns.
        generator: for random draws.
        ridge: relative λ of the repair to come; center: whether it will have an intercept.
        keep: how many units will stay; None where scores are wanted before that is known.
        notes: what the report should say of the judgement; criteria may add lines.
    """

    site: Site
    statistics: Columns
    generator: torch.Generator = field(default_factory=torch.Generator)
    ridge: float = 0.0
    center: bool = False
    keep: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def moments(self) -> Moments:
        """The statistics, of a criterion that `needs` Moments."""
        assert isinstance(self.statistics, Moments), "the engine supplies what a criterion needs"
        return self.statistics


@dataclass(frozen=True)
class Criterion:
    """Attributes:
    name: as users write it.
    score: Evidence -> scores, (columns,) or (units,) float64. Column scores are summed over a unit
        for ranking.
    needs: `columns`, or `moments` where means and mean squares of single columns do not do.
    choose: Evidence with `keep` -> the units to keep, (keep,) int64 in any order, for a criterion
        whose choice is no ranking; None ranks by `score`.
    greedy: what goes next depends on what has gone (`ops.removal`).
    flops, holds: (columns, outputs, dropped columns) -> what a judgement of one Site computes, and
        the most bytes that it holds beside the statistics. As here where weights are read once.
    """

    name: str
    score: Callable[[Evidence], Tensor]
    needs: Literal["columns", "moments"] = "columns"
    choose: Callable[[Evidence], Tensor] | None = None
    greedy: bool = False
    flops: Callable[[int, int, int], int] = lambda columns, outputs, dropped: 0
    # the weights in float64, and one function of them
    holds: Callable[[int, int, int], int] = lambda columns, outputs, dropped: 16 * columns * outputs

    def select(self, evidence: Evidence) -> Tensor:
        """The units to keep, (keep,) int64 sorted."""
        if self.choose is not None:
            return self.choose(evidence).sort().values
        scores = unit_scores(evidence.site, self.score(evidence))
        return scores.argsort(descending=True, stable=True)[: evidence.keep].sort().values


def unit_scores(site: Site, scores: Tensor) -> Tensor:
    """Scores per unit, (units,), for ranking inside one Site."""
    return scores if scores.numel() == site.units else site.per_unit(scores)

"""Criterion: scores the units of a Site; high means keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from liar_ext.models.site import Site


class Columns(Protocol):
    """What a criterion may ask of the statistics: `Moments` and `ColumnMoments` both answer."""

    def mean(self) -> Tensor: ...
    def diagonal(self) -> Tensor: ...
    def variance(self) -> Tensor: ...


@dataclass(frozen=True)
class Criterion:
    """Attributes:
    name: as users write it.
    score: (site, statistics, generator) -> scores, (columns,) or (units,) float64. Column scores
        are summed over a unit for ranking.
    """

    name: str
    score: Callable[[Site, Columns, torch.Generator], Tensor]


def unit_scores(site: Site, scores: Tensor) -> Tensor:
    """Scores per unit, (units,), for ranking inside one Site."""
    return scores if scores.numel() == site.units else site.per_unit(scores)

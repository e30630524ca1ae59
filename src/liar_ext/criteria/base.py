"""Criterion: scores the units of a Site; high means keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from liar_ext.models.site import Site
from liar_ext.ops.moments import Moments
from liar_ext.ops.saliency import UnitGradients

Needs = Literal["weights", "columns", "moments", "gradients", "weight_gradients", "policy"]


class Columns(Protocol):
    """What a criterion may ask of the statistics: `Moments` and `ColumnMoments` both answer."""

    def mean(self) -> Tensor: ...
    def diagonal(self) -> Tensor: ...
    def variance(self) -> Tensor: ...


# of one Site, by the pass that a criterion needs: gradients of a loss, or keep probabilities
Prior = UnitGradients | Tensor


@dataclass(frozen=True)
class Evidence:
    """What a criterion judges one Site by.

    Attributes:
        site: the Site, dense; measured: statistics of its columns, None where they are not taken.
        generator: for random draws.
        ridge: relative λ of the repair to come; center: whether it will have an intercept.
        prior: what a pass before pruning found of the Site; None for criteria without one.
        keep: how many units will stay; None where scores are wanted before that is known.
        notes: what had to be raised or repeated for the judgement; criteria may add lines.
        remarks: what else the report should say of it.
    """

    site: Site
    measured: Columns | None
    generator: torch.Generator = field(default_factory=torch.Generator)
    ridge: float = 0.0
    center: bool = False
    prior: Prior | None = None
    keep: int | None = None
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def statistics(self) -> Columns:
        """Of a criterion that `needs` those of columns."""
        assert self.measured is not None, "the engine supplies what a criterion needs"
        return self.measured

    @property
    def moments(self) -> Moments:
        """The statistics, of a criterion that `needs` Moments."""
        assert isinstance(self.measured, Moments), "the engine supplies what a criterion needs"
        return self.measured

    @property
    def gates(self) -> Tensor:
        """`∂L_x/∂m_u`, (examples, units) float64, of a criterion that `needs` gradients."""
        assert isinstance(self.prior, UnitGradients), "the engine supplies what a criterion needs"
        return self.prior.gates

    def taylor(self, form: str) -> Tensor:
        """One of `TAYLOR_FORMS`, (units,) float64, if it `needs` those of weights."""
        assert isinstance(self.prior, UnitGradients), "the engine supplies what a criterion needs"
        return self.prior.taylor[form]

    @property
    def probabilities(self) -> Tensor:
        """Keep probabilities, (units,) float64, of a criterion that `needs` a policy."""
        assert isinstance(self.prior, Tensor), "the engine supplies what a criterion needs"
        return self.prior


@dataclass(frozen=True)
class Criterion:
    """Attributes:
    name: as users write it.
    score: Evidence -> scores, (columns,) or (units,) float64. Column scores are summed over a unit
        for ranking.
    needs: `weights` alone; `columns`, means and mean squares of the inputs, or `moments` where
        those do not do; `gradients` of a loss with respect to gates on units, or
        `weight_gradients` beside them; `policy`, keep probabilities of units. The last three come
        from a pass of their own over the dense model before anything is pruned
        (`engine.passes`), and take no statistics.
    choose: Evidence with `keep` -> the units to keep, (keep,) int64 in any order, for a criterion
        whose choice is no ranking; None ranks by `score`.
    descend: Evidence and widths, the widest first -> the units to keep at each, as `choose` has
        them, where a choice goes on from the one before.
    greedy: what goes next depends on what has gone (`ops.removal`).
    flops, holds: (columns, outputs, dropped columns) -> what a judgement of one Site computes, and
        the most bytes that it holds beside the statistics. As here where weights are read once.
    """

    name: str
    score: Callable[[Evidence], Tensor]
    needs: Needs = "columns"
    choose: Callable[[Evidence], Tensor] | None = None
    descend: Callable[[Evidence, Sequence[int]], list[Tensor]] | None = None
    greedy: bool = False
    flops: Callable[[int, int, int], int] = lambda columns, outputs, dropped: 0
    # the weights in float64, and one function of them
    holds: Callable[[int, int, int], int] = lambda columns, outputs, dropped: 16 * columns * outputs

    @property
    def differentiates(self) -> bool:
        """Whether it needs a loss."""
        return self.needs in ("gradients", "weight_gradients")

    def select(self, evidence: Evidence) -> Tensor:
        """The units to keep, (keep,) int64 sorted."""
        if self.choose is not None:
            return self.choose(evidence).sort().values
        return self._ranked(evidence)[: evidence.keep].sort().values

    def selections(self, evidence: Evidence, widths: Sequence[int]) -> list[Tensor]:
        """The units to keep at each of these widths, the widest first; (width,) int64 sorted.

        What the criterion computes for all of them, it computes once.
        """
        if self.descend is not None:
            return [kept.sort().values for kept in self.descend(evidence, widths)]
        if self.choose is not None:
            return [self.select(replace(evidence, keep=width)) for width in widths]
        order = self._ranked(evidence)
        return [order[:width].sort().values for width in widths]

    def selections_flops(self, columns: int, outputs: int, dropped: Sequence[int]) -> int:
        """What `selections` computes; `dropped`: columns, at each width."""
        once = self.descend is not None or self.choose is None
        return sum(self.flops(columns, outputs, d) for d in ([max(dropped)] if once else dropped))

    def _ranked(self, evidence: Evidence) -> Tensor:
        """Units, the one to keep longest first."""
        scores = unit_scores(evidence.site, self.score(evidence))
        return scores.argsort(descending=True, stable=True)


def unit_scores(site: Site, scores: Tensor) -> Tensor:
    """Scores per unit, (units,), for ranking inside one Site."""
    return scores if scores.numel() == site.units else site.per_unit(scores)

"""Removal: which columns a least-squares repair can do without, one exact step after another.

With `A = C + λI` and the consumer W (out, n), dropping the units M and repairing the rest costs

    loss(M) = tr(W_M Θ_MM⁻¹ W_Mᵀ),   Θ = A⁻¹

which is what remains of `E‖W'x_S − Wx‖²` (with the ridge's own `λ‖W' − W_S‖²`) at its optimum: the
joint score of optimal brain surgeon, ZipLM (arXiv 2302.04089) and OSSCAR (2403.12983).

`Tableau` holds A swept on the kept columns (Gauss–Jordan in symmetric form), and with it W:

    matrix = [ −A_SS⁻¹   Q ]     Q = A_SS⁻¹ A_SM         rows = [ W_S + W_M Qᵀ   W_M K ]
             [   Qᵀ      K ]     K = A_MM − A_MS Q

A unit g changes sides by a pivot on its block, and the loss changes by `tr(E_g |B_gg|⁻¹ E_gᵀ)` with
E its columns of `rows` and B those of `matrix`, whichever way it goes: up when it is dropped, down
when it returns. So removal and exchange are one operation of 2 n² (n + out) / n FLOPs a column.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.inverse import inverse_bytes, inverse_flops
from liar_ext.ops.moments import BLOCK, spans

# single columns that are compared exactly, with each other's removal in mind, for each that is
# dropped in a step; the other columns wait for the step's end
CANDIDATES = 4
# steps in which single columns are dropped: each reads all of `rows` once
STEPS = 128
EXCHANGES = 30
# single units that are tried before an exchange is given up; of heads often all there are
TRIES = 16
# columns of wide units whose costs are made together
_JUDGED = 128
# a smaller gain is not worth an exchange, and could be rounding
LEAST_GAIN = 1e-6


def loss_reference(matrix: Tensor, weight: Tensor, drop: Tensor) -> Tensor:
    """The definition: loss(M) by a solve of the kept columns, 0-dim float64.

    Args:
        matrix: A (n, n); weight: W (out, n); drop: int64 columns M.
    """
    matrix, weight = matrix.double(), weight.double()
    kept = torch.ones(len(matrix), dtype=torch.bool)
    kept[drop] = False
    keep = kept.nonzero().flatten()
    q = torch.linalg.lstsq(matrix[keep][:, keep], matrix[keep][:, drop]).solution
    rest = matrix[drop][:, drop] - matrix[drop][:, keep] @ q
    return ((weight[:, drop] @ rest) * weight[:, drop]).sum()


def greedy_reference(matrix: Tensor, weight: Tensor, width: int, keep: int) -> list[int]:
    """The definition of greedy removal: units in the order in which they go, one at a time."""
    units = matrix.shape[0] // width
    gone: list[int] = []
    while units - len(gone) > keep:
        rest = [unit for unit in range(units) if unit not in gone]
        tried = [float(loss_reference(matrix, weight, columns([*gone, u], width))) for u in rest]
        gone.append(rest[tried.index(min(tried))])
    return gone


def best_reference(matrix: Tensor, weight: Tensor, width: int, keep: int) -> tuple[int, ...]:
    """The kept units with the least loss, of all there are."""
    units = range(matrix.shape[0] // width)

    def loss(kept: tuple[int, ...]) -> float:
        dropped = [unit for unit in units if unit not in kept]
        return float(loss_reference(matrix, weight, columns(dropped, width)))

    return min(combinations(units, keep), key=loss)


def columns(units: list[int], width: int) -> Tensor:
    """Columns of units of `width` columns each."""
    return torch.tensor([unit * width + i for unit in units for i in range(width)])


class Tableau:
    """All units kept, at first.

    Args:
        theta: (n, n) float64 `(C + λI)⁻¹`, both triangles; its memory is used.
        weight: W (out, n) of any floating dtype.
        width: columns of a unit.
        dead: (n,) bool: columns without variance, which cost nothing whatever their weights.

    Attributes:
        kept: (units,) bool.
        loss: what dropping the others costs, in the units of `W C Wᵀ`.
    """

    def __init__(
        self, theta: Tensor, weight: Tensor, width: int, dead: Tensor | None = None
    ) -> None:
        self.matrix = theta.neg_()
        self.rows = weight.detach().to(torch.float64, copy=True)
        if dead is not None:
            self.rows.masked_fill_(dead, 0.0)
        self.width = width
        self.kept = torch.ones(theta.shape[0] // width, dtype=torch.bool, device=theta.device)
        self.loss = 0.0

    def costs(self) -> Tensor:
        """How much the loss changes when a unit changes sides, (units,) float64, each ≥ 0.

        Raises:
            NumericalError: a block of several columns is not positive definite any more.
        """
        if self.width == 1:
            squares = torch.zeros_like(self.rows[0])
            # a part at a time: all of them are as large as W
            for start, stop in spans(0, len(self.rows)):
                squares += self.rows[start:stop].square().sum(0)
            return squares / self.matrix.diagonal().abs()
        units, width = self.kept.numel(), self.width
        blocks = self.matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2)
        # (units, width, width), positive definite on either side
        blocks = torch.where(self.kept[:, None, None], -1.0, 1.0) * blocks.permute(2, 0, 1)
        factor, info = torch.linalg.cholesky_ex(blocks)
        if bool(info.any()):
            raise NumericalError(
                f"blocks of {int((info != 0).sum())} units are not positive definite any more"
            )
        edges = self.rows.view(-1, units, width).permute(1, 2, 0)
        step = max(1, _JUDGED // width)
        return torch.cat(
            [
                (torch.cholesky_solve(own, lower) * own).sum((1, 2))
                for own, lower in zip(edges.split(step), factor.split(step), strict=True)
            ]
        )

    def remove(self, count: int, *, steps: int = STEPS) -> tuple[Tensor, Tensor]:
        """Drop `count` units greedily.

        Args:
            steps: in which single columns are dropped, at most.
        Returns:
            the units in the order in which they went, and what each added to the loss then, as it
            was judged in its step; a unit that went later never cost less.
        """
        gone: list[Tensor] = []
        costs: list[Tensor] = []
        while count:
            step = max(1, -(-count // max(steps - len(gone), 1))) if self.width == 1 else 1
            units, added = self._next(min(step, count))
            self.move(units)
            gone.append(units)
            costs.append(added)
            count -= len(units)
        if not gone:
            return torch.zeros(0, dtype=torch.int64, device=self.kept.device), self.rows[0, :0]
        return torch.cat(gone), torch.cat(costs).cummax(0).values

    def exchange(self, most: int) -> int:
        """Let dropped units return and others go for them, as long as the loss falls.

        The best `most` return together and the cheapest go; where that gains nothing, half as many
        (OSSCAR's local search), and at last each of the `TRIES` best by itself.

        Returns:
            how many exchanges were kept.
        """
        kept, size = 0, min(most, int(self.kept.sum()), int((~self.kept).sum()))
        for _ in range(EXCHANGES):
            # of no loss there is nothing to gain, and what rounding makes of it is no gain
            if size < 1 or not self.loss > 0:
                break
            tried = [self._gains()[:size]] if size > 1 else self._gains()[:TRIES].split(1)
            if any(self._swap(units) for units in tried):
                kept += 1
            else:
                size //= 2
        return kept

    def _gains(self) -> Tensor:
        """The dropped units, the one whose return gains most first."""
        gains = torch.where(self.kept, -torch.inf, self.costs())
        return gains.argsort(descending=True, stable=True)[: int((~self.kept).sum())]

    def _swap(self, returned: Tensor) -> bool:
        """Exchange these for the cheapest; undone, and False, if that gains nothing."""
        before = self.loss
        self.move(returned)
        gone = self._next(len(returned))[0]
        self.move(gone)
        if self.loss < before * (1 - LEAST_GAIN):
            return True
        self.move(gone)
        self.move(returned)
        self.loss = before
        return False

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` kept units to drop, in the order in which they should go, and their costs."""
        costs = torch.where(self.kept, self.costs(), torch.inf)
        if self.width > 1 or count == 1:
            # of several wide ones each is judged alone
            order = costs.argsort(stable=True)[:count]
            return order, costs[order]
        near = costs.argsort(stable=True)[: min(CANDIDATES * count, int(self.kept.sum()))]
        edges = self.rows[:, near]
        found, added = _greedy(-self.matrix[near[:, None], near], edges.T @ edges, count)
        return near[found], added

    def move(self, units: Tensor) -> None:
        """Let units change sides, all of them from the same one.

        Raises:
            NumericalError: their block is not positive definite any more.
        """
        leaving = bool(self.kept[units[0]])
        own = _columns(units, self.width)
        across, edge = self.matrix[own], self.rows[:, own]
        factor, info = torch.linalg.cholesky_ex(-across[:, own] if leaving else across[:, own])
        if int(info):
            raise NumericalError(
                f"a block of {len(own)} columns is not positive definite (pivot {int(info)})"
            )
        scaled = torch.cholesky_solve(across, factor)
        turned = torch.cholesky_solve(edge.T, factor).T
        inverse = torch.cholesky_inverse(factor)
        sign = 1.0 if leaving else -1.0
        self.matrix.addmm_(across.T, scaled, alpha=sign)
        self.rows.addmm_(edge, scaled, alpha=sign)
        self.matrix[own] = scaled
        self.matrix[:, own] = scaled.T
        self.matrix[own[:, None], own] = inverse if leaving else -inverse
        self.rows[:, own] = turned
        self.kept[units] = not leaving
        self.loss += sign * float((turned * edge).sum())


def _greedy(theta: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy removal of single columns among a few: positions in order, and what each adds.

    Args:
        theta: Θ of the candidates (c, c); squares: `EᵀE` of their columns of the repaired weights.
    """
    gone = torch.zeros(len(theta), dtype=torch.bool, device=theta.device)
    found, added = [], []
    for _ in range(count):
        costs = torch.where(gone, torch.inf, squares.diagonal() / theta.diagonal())
        # an index of one element: a number would wait for the device
        at = costs.argmin()[None]
        found.append(at)
        added.append(costs[at])
        row = theta[at]
        share = row / row[:, at]
        edge = squares[at]
        # E ← E − E_j a, Θ ← Θ − Θ_j a, with a = Θ_j / Θ_jj; what is gone takes part no more
        squares = squares - share.T @ edge - edge.T @ share + edge[:, at] * (share.T @ share)
        theta = theta - row.T @ share
        gone[at] = True
        theta[at, at] = 1.0
    return torch.cat(found), torch.cat(added)


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def removal_flops(columns: int, outputs: int, dropped: int) -> int:
    """Of an inverse and `dropped` columns that go: `2n (n + out)` each."""
    return inverse_flops(columns) + 2 * columns * (columns + outputs) * dropped


def removal_bytes(columns: int, outputs: int, dropped: int) -> int:
    """Most that a `Tableau` holds on its way: the inverse, or it and W, and rows of a step.

    A pivot on k columns holds their rows of the tableau three times (as they were, scaled, and what
    is stored), and their candidates' columns of W; costs hold squares of a block of W.
    """
    step = max(1, -(-dropped // STEPS))
    moving = 3 * step * columns + (CANDIDATES + 2) * step * outputs
    judging = max(min(outputs, BLOCK) * columns, 2 * outputs * min(columns, _JUDGED))
    tableau = columns**2 + outputs * columns + max(moving, judging)
    return max(inverse_bytes(columns), 8 * tableau)

"""rotation, rotation-scaled: `W'_S = s R W_S` with R orthogonal (RCPU, arXiv 2510.07782).

The orthogonal Procrustes solution in the space of outputs: with `M = E[y y_Sᵀ] = W C_:S W_Sᵀ` of
the dense and the pruned outputs, and its singular values σ,

    R = U Vᵀ of M + λ W_S W_Sᵀ = U Σ Vᵀ        s = Σσ / tr(W_S (C_SS + λI) W_Sᵀ), or 1

which minimises `E‖s R y_S − y‖² + λ‖s R W_S − W_S‖²`. All rows of W make R together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.system import folded_bytes, folded_system
from liar_ext.reconstruction.base import Fit, Reconstruction, Repaired, Task


def rotation_reference(
    x: Tensor, weight: Tensor, keep: Tensor, ridge: float, center: bool, *, scaled: bool
) -> tuple[Tensor, float]:
    """The definition, on raw activations `x` (T, n) in float64: R (out, out) and s.

    Procrustes between the rows of pruned and of dense outputs; the ridge is further rows that both
    have alike, `√(Tλ) W_Sᵀ`.
    """
    x, weight = x.double(), weight.double()
    tokens = x.shape[0]
    moved = x - x.mean(0) if center else x
    strength = (ridge * moved.square().mean(0).mean() * tokens).sqrt()
    further = strength * weight[:, keep].T
    pruned = torch.cat([moved[:, keep] @ weight[:, keep].T, further])
    dense = torch.cat([moved @ weight.T, further])
    left, sigma, right = torch.linalg.svd(dense.T @ pruned)
    return left @ right, float(sigma.sum() / pruned.square().sum()) if scaled else 1.0


@dataclass(frozen=True)
class _Outputs:
    """Attributes: M and `W_S W_Sᵀ` (out, out) float64; `tr(W_S C_SS W_Sᵀ)`; mean(diag C); dead
    columns."""

    cross: Tensor
    squares: Tensor
    energy: float
    mean_diagonal: float
    dead: int

    @classmethod
    def of(cls, task: Task) -> _Outputs:
        system, right = folded_system(
            task.moments, task.weight, task.keep, task.drop, task.ridge, task.intercept
        )
        kept = task.weight[:, task.keep].double()
        own = kept @ system.kept
        energy = float((own * kept).sum())
        own += right.T
        return cls(
            own @ kept.T, kept @ kept.T, energy, system.mean_diagonal, int(system.dead.sum())
        )

    def turn(self, task: Task, ridge: float, *, scaled: bool) -> tuple[Tensor, Diagnostics]:
        """`s R`."""
        strength = ridge * self.mean_diagonal
        left, sigma, right = torch.linalg.svd(self.cross + strength * self.squares)
        rotation = left @ right
        off = rotation.T @ rotation
        off.diagonal().sub_(1.0)
        outputs = len(off)
        least = sigma[min(outputs, task.keep.numel()) - 1]
        largest = float(sigma[0])
        found = Diagnostics(
            ridge,
            ridge,
            strength,
            # of M where W_S is: what it leaves out does not matter to R W_S
            condition=largest / max(float(least), torch.finfo(torch.float64).eps * largest, 1e-300),
            backward_error=float(off.norm()) / outputs**0.5,
            dead=self.dead,
            precision="float64",
        )
        energy = self.energy + strength * float(self.squares.diagonal().sum())
        if scaled and energy > 0:
            rotation *= float(sigma.sum()) / energy
        return rotation, found


def _rotation(name: str, *, scaled: bool) -> Reconstruction:
    def repair(task: Task) -> Repaired:
        turned, diagnostics = _Outputs.of(task).turn(task, task.ridge, scaled=scaled)
        weight = turned @ task.weight[:, task.keep].double()
        return Repaired(weight, task.shift(weight), diagnostics)

    def sweep(task: Task) -> Fit:
        outputs = _Outputs.of(task)

        def fit(ridge: float) -> Tensor:
            turned, _ = outputs.turn(task, ridge, scaled=scaled)
            turned.diagonal().sub_(1.0)
            return (turned @ task.weight[:, task.keep].double()).T

        return fit

    return Reconstruction(name, repair, whole=True, sweep=sweep, holds=holds, flops=flops)


def holds(kept: int, dropped: int, outputs: int, rows: int) -> int:
    """Bytes: M, W_S W_Sᵀ, and what an SVD of M takes; W_S twice while M is made."""
    made = 8 * (kept * kept + 3 * outputs * kept + 2 * outputs * outputs)
    turned = 8 * (2 * outputs * kept + 9 * outputs * outputs)
    return max(folded_bytes(kept, dropped, outputs), made, turned)


def flops(kept: int, dropped: int, outputs: int) -> int:
    """22 out³ for the SVD, and the products that make M and R W_S."""
    products = kept * dropped + kept * kept + 3 * outputs * kept
    return 2 * outputs * products + 22 * outputs**3


ROTATIONS = (_rotation("rotation", scaled=False), _rotation("rotation-scaled", scaled=True))

"""mask-tuning: one scale for each kept unit, `W'_u = r_u W_u` (Kwon et al., arXiv 2204.09656).

    minimise E‖Σ_u r_u W_u x_u − W x‖² + λ Σ_u (r_u − 1)² ‖W_u‖²

Its normal matrix is `(W_SᵀW_S) ∘ C_SS` summed over blocks of units. All rows of W share the scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.moments import BLOCK, spans
from liar_ext.ops.solve import solve
from liar_ext.ops.system import folded_bytes, folded_system
from liar_ext.reconstruction.base import Fit, Reconstruction, Repaired, Task

# |scales| above are refused, as in the paper
WINDOW = 10.0


def scales_reference(
    x: Tensor, weight: Tensor, keep: Tensor, unit: int, ridge: float, center: bool
) -> Tensor:
    """The definition, on raw activations `x` (T, n) in float64, by `torch.linalg.lstsq`: (units,).

    One column of the system for each unit, `vec(x_u W_uᵀ)`, and the ridge as further rows. Scales
    are not refused.
    """
    x, weight = x.double(), weight.double()
    tokens = x.shape[0]
    moved = x - x.mean(0) if center else x
    strength = ridge * moved.square().mean(0).mean() * tokens
    blocks = keep.view(-1, unit)
    outputs = [(moved[:, block] @ weight[:, block].T).flatten() for block in blocks]
    norms = torch.stack([weight[:, block].norm() for block in blocks])
    system = torch.cat([torch.stack(outputs, 1), torch.diag(strength.sqrt() * norms)])
    target = torch.cat([(moved @ weight.T).flatten(), strength.sqrt() * norms])
    return torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution[:, 0]


@dataclass(frozen=True)
class _Normal:
    """The normal equations of `d_u = (r_u − 1)‖W_u‖`, in which the ridge is λI.

    Attributes: matrix (u, u), right (u,), float64; inverse: 1/‖W_u‖, 0 for a unit without weights;
    mean_diagonal: of C; floor: rounding of the matrix; dead: kept columns without variance.
    """

    matrix: Tensor
    right: Tensor
    inverse: Tensor
    mean_diagonal: float
    floor: float
    dead: int

    def scales(self, task: Task, ridge: float) -> tuple[Tensor, Diagnostics]:
        """r, (u,). What is outside the window is refused, and the others are fitted again."""
        matrix, right, refused = self.matrix, self.right, 0
        steps: tuple[str, ...] = ()
        while True:
            solved = solve(
                matrix[None],
                right[None, :, None],
                ridge,
                unit=[self.mean_diagonal],
                moments_dtype=task.moments.gram.dtype,
                floor=self.floor,
            )
            scales = 1.0 + solved.solution[0, :, 0] * self.inverse
            steps += solved.diagnostics[0].steps
            outside = scales.abs() > WINDOW
            if not bool(outside.any()):
                found = replace(solved.diagnostics[0], dead=self.dead, steps=steps)
                return scales, found
            refused += int(outside.sum())
            steps += (
                f"{refused} of {scales.numel()} scales outside ±{WINDOW:g} refused, left at 1",
            )
            matrix = matrix.masked_fill(outside[:, None] | outside, 0.0)
            right = right.masked_fill(outside, 0.0)


def _normal(task: Task) -> _Normal:
    system, cross = folded_system(
        task.moments, task.weight, task.keep, task.drop, task.ridge, task.intercept
    )
    weight, keep = task.weight.detach(), task.keep
    # C_SS turns into the products in place
    matrix, right = system.kept, cross.new_empty(keep.numel())
    squares = torch.empty_like(right)
    for start, stop in spans(0, keep.numel()):
        rows = weight[:, keep[start:stop]].double().T
        right[start:stop] = (rows * cross[start:stop]).sum(1)
        squares[start:stop] = rows.square().sum(1)
        for first, last in spans(0, keep.numel()):
            matrix[start:stop, first:last] *= rows @ weight[:, keep[first:last]].double()
    del cross
    units = keep.numel() // task.unit
    columns = matrix.diagonal().reshape(units, -1).sum(1)
    if task.unit > 1:
        matrix = matrix.view(units, task.unit, units, task.unit).sum((1, 3))
    right, squares = right.view(units, -1).sum(1), squares.view(units, -1).sum(1)
    own = matrix.diagonal().clone()
    # the columns of a unit may cancel: of what they are each, its rounding is so much more of it
    live = (own > system.floor * columns) & (squares > 0)
    excess = float((columns / own)[live].max().clamp(min=1)) if bool(live.any()) else 1.0
    inverse = torch.where(live, squares.rsqrt(), 0.0)
    matrix *= inverse
    matrix *= inverse[:, None]
    return _Normal(
        matrix,
        right * inverse,
        inverse,
        system.mean_diagonal,
        system.floor * excess,
        int(system.dead.sum()),
    )


def _by_column(task: Task, scales: Tensor) -> Tensor:
    return scales.repeat_interleave(task.unit)


def repair(task: Task) -> Repaired:
    scales, diagnostics = _normal(task).scales(task, task.ridge)
    weight = task.weight[:, task.keep].double() * _by_column(task, scales)
    return Repaired(weight, task.shift(weight), diagnostics)


def sweep(task: Task) -> Fit:
    """One Cholesky of the units for each ridge."""
    normal = _normal(task)

    def fit(ridge: float) -> Tensor | None:
        scales, found = normal.scales(task, ridge)
        if found.ridge_used != ridge:
            return None
        change = task.weight[:, task.keep].double() * (_by_column(task, scales) - 1.0)
        return change.T

    return fit


def holds(kept: int, dropped: int, outputs: int, rows: int) -> int:
    """Bytes, for units of one column: the system, its factor, and panels of W."""
    solved = 16 * kept * kept + 8 * BLOCK * (kept + 2 * BLOCK)
    made = 8 * (kept * kept + outputs * kept + 2 * outputs * min(kept, BLOCK))
    return max(folded_bytes(kept, dropped, outputs), made, solved, 8 * outputs * kept)


def flops(kept: int, dropped: int, outputs: int) -> int:
    return 2 * kept * dropped * outputs + 2 * kept * kept * outputs + kept**3 // 3


MASK_TUNING = Reconstruction(
    "mask-tuning", repair, whole=True, sweep=sweep, holds=holds, flops=flops
)

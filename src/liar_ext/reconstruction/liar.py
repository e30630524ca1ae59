"""liar: `W' = W_S + W_M Qᵀ`, `b' = b + W_M P` with the least-squares Q and P (arXiv 2407.13331).

Without an intercept the uncentred system is solved and P is zero (`ops.interpolate`). Where the
target is the dense path's output, the same fit has the drift on its right side (`ops.drift`).
"""

from torch import Tensor

from liar_ext.ops.interpolate import costs, repair_bytes
from liar_ext.ops.interpolate import repair as fold
from liar_ext.ops.system import folded_system
from liar_ext.reconstruction.base import Fit, Reconstruction, Repaired, Task


def repair(task: Task) -> Repaired:
    found = fold(
        task.moments,
        task.weight,
        task.keep,
        task.drop,
        ridge=task.ridge,
        center=task.intercept,
        outputs=task.outputs,
        drift=task.drift,
    )
    return Repaired(found.weight, found.shift if task.intercept else None, found.diagnostics)


def sweep(task: Task) -> Fit:
    """One Cholesky and one substitution for each ridge; `C_SS` and `C_SM W_Mᵀ` once."""
    system, right = folded_system(
        task.moments, task.weight, task.keep, task.drop, task.ridge, task.intercept, task.drift
    )

    def fit(ridge: float) -> Tensor | None:
        solved = system.solve(right, ridge, task.moments.gram.dtype, "auto")
        held = solved.diagnostics[0].ridge_used == ridge
        return solved.solution[0] if held else None

    return fit


def flops(kept: int, dropped: int, outputs: int) -> int:
    return int(min(costs(kept, dropped, outputs, False).values()))


LIAR = Reconstruction(
    "liar",
    repair,
    solves=True,
    follows=True,
    sweep=sweep,
    holds=repair_bytes,
    flops=flops,
)

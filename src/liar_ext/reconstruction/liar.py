"""liar: `W' = W_S + W_M Qᵀ`, `b' = b + W_M P` with the least-squares Q and P (arXiv 2407.13331).

Without an intercept the uncentred system is solved and P is zero (`ops.interpolate`). Where the
target is the dense path's output, the same fit has the drift on its right side (`ops.drift`).
"""

from liar_ext.ops.drift import repair_drifted
from liar_ext.ops.interpolate import repair as fold
from liar_ext.reconstruction.base import Reconstruction, Repaired, Task


def repair(task: Task) -> Repaired:
    if task.drift is not None:
        found = repair_drifted(
            task.moments,
            task.drift,
            task.weight,
            task.keep,
            task.drop,
            ridge=task.ridge,
            center=task.intercept,
        )
    else:
        found = fold(
            task.moments,
            task.weight,
            task.keep,
            task.drop,
            ridge=task.ridge,
            center=task.intercept,
            outputs=task.outputs,
        )
    return Repaired(found.weight, found.shift if task.intercept else None, found.diagnostics)


LIAR = Reconstruction("liar", repair, solves=True, follows=True)

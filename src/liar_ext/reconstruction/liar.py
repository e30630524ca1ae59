"""liar: `W' = W_S + W_M Qᵀ`, `b' = b + W_M P` with the least-squares Q and P (arXiv 2407.13331).

Without an intercept the uncentred system is solved and P is zero (`ops.interpolate`).
"""

from liar_ext.ops.interpolate import repair as fold
from liar_ext.reconstruction.base import Reconstruction, Repaired, Task


def repair(task: Task) -> Repaired:
    folded = fold(
        task.moments,
        task.weight,
        task.keep,
        task.drop,
        ridge=task.ridge,
        center=task.intercept,
        outputs=task.outputs,
    )
    return Repaired(folded.weight, folded.shift if task.intercept else None, folded.diagnostics)


LIAR = Reconstruction("liar", repair, solves=True)

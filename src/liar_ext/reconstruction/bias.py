"""bias: `b' = b + W_M μ_M`, each dropped column replaced by its mean (FLAP, arXiv 2312.11983)."""

from liar_ext.reconstruction.base import Reconstruction, Repaired, Task


def repair(task: Task) -> Repaired:
    shift = task.weight[:, task.drop].double() @ task.moments.mean()[task.drop]
    return Repaired(task.weight[:, task.keep], shift)


BIAS = Reconstruction("bias", repair, needs_bias=True, uses_ridge=False)

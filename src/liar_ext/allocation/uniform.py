"""uniform: every Site keeps the same fraction of its units; what stock checkpoints can express."""

from collections.abc import Sequence

from liar_ext.allocation.base import Allocation, Budget


def wanted(budgets: Sequence[Budget], sparsity: float) -> list[float]:
    return [budget.units * (1 - sparsity) for budget in budgets]


UNIFORM = Allocation("uniform", wanted, survey=None, equal=True)

"""admm: the reformation of "Search for Efficient LLMs" (arXiv 2409.17372), by its own iteration.

For `min tr((Ŵ − W)(C + λI)(Ŵ − W)ᵀ)` over Ŵ (out, n) with `Ŵ_M = 0`:

    Ŵ ← (W (C + λI) + ρ (Z − U)) (C + (λ + ρ) I)⁻¹
    Z ← Ŵ + U with zeros in M        U ← U + Ŵ − Z

The minimum is the weights of `liar` with the same ridge: this is there to compare the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.factor import Scaled, spread
from liar_ext.ops.moments import BLOCK, gather_bytes
from liar_ext.ops.system import kept_system
from liar_ext.reconstruction import liar
from liar_ext.reconstruction.base import Reconstruction, Repaired, Task

# estimated distance from the minimum over `‖Z‖`, in columns of unit variance, that is close enough
TOLERANCE = 1e-6
# the paper does 30 iterations and its code 20, with more damping than a fit needs
ITERATIONS = 500


def iterate(
    matrix: Tensor,
    weight: Tensor,
    drop: Tensor,
    penalty: float,
    *,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, int, float]:
    """The iteration for `A = C + λI` (n, n) and W (out, n) float64, from Z = W without M, U = 0.

    `U_S` stays 0 and `Z_M` is 0, so one matrix has all of the state: `V = Z − U`. Its kept columns
    become those of Ŵ, and from its dropped ones those of Ŵ are subtracted.

    Args:
        penalty: ρ.
    Returns:
        Z (out, n); how many iterations; the estimated distance from the minimum: the last change of
        V times q/(1 − q), with q its ratio to the one before, as the changes of a linear iteration
        end in a geometric series; over `‖V‖`.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise NumericalError(f"admm: C + (λ + ρ)I is not positive definite at pivot {int(info)}")
    inverse = torch.cholesky_inverse(factor).mul_(penalty)
    del shifted, factor
    # W (C + λI)(C + (λ + ρ)I)⁻¹
    base = weight - weight @ inverse
    state = weight.clone()
    state[:, drop] = 0.0
    before, distance, count = math.inf, math.inf, 0
    while count < iterations and not distance <= tolerance:
        count += 1
        found = torch.addmm(base, state, inverse)
        found[:, drop] = state[:, drop] - found[:, drop]
        change, size = float((found - state).norm()), float(found.norm())
        state = found
        rate = min(change / max(before, 1e-300), 1.0 - 1e-9)
        distance = change * max(rate / (1.0 - rate), 1.0) / max(size, 1e-300)
        before = change
    state[:, drop] = 0.0
    return state, count, distance


def repair(task: Task) -> Repaired:
    """In columns of unit variance, as the paper's code does it.

    ρ is `√(smallest · largest)` eigenvalue: kept columns approach the minimum by a factor of
    `ρ / (ρ + smallest)` in an iteration, and the multipliers of dropped ones at a rate that falls
    with ρ instead.
    """
    every = torch.arange(task.moments.columns, device=task.keep.device)
    system = kept_system(task.moments, every, every[:0], task.ridge, task.intercept)
    dead = int(system.dead[task.keep].sum())
    strength = task.ridge * system.mean_diagonal
    matrix = system.kept
    matrix.diagonal().add_(strength)
    scale = matrix.diagonal().rsqrt()
    scale = torch.where(scale.isfinite(), scale, 1.0)
    matrix *= scale
    matrix *= scale[:, None]
    largest, smallest = spread(Scaled.of(matrix[None], matrix.new_zeros(1)))
    # rounding: what is smaller is not known
    smallest = max(smallest, system.floor)
    found, count, distance = iterate(
        matrix,
        task.weight.double() / scale,
        task.drop,
        (smallest * largest) ** 0.5,
        tolerance=TOLERANCE,
        iterations=ITERATIONS,
    )
    weight = (found * scale)[:, task.keep]
    if not bool(weight.isfinite().all()):
        raise NumericalError(f"admm: diverged in {count} iterations; give a larger --ridge")
    steps: tuple[str, ...] = ()
    if not distance <= TOLERANCE:
        steps = (
            f"admm: not converged after {count} iterations, estimated {distance:.1e} from the "
            f"minimum ({TOLERANCE:.0e} is converged); --reconstruct liar solves for it",
        )
    diagnostics = Diagnostics(
        task.ridge,
        task.ridge,
        strength,
        condition=largest / smallest,
        backward_error=distance,
        dead=dead,
        precision="float64",
        steps=steps,
        iterations=count,
    )
    return Repaired(weight, task.shift(weight), diagnostics)


def holds(kept: int, dropped: int, outputs: int, rows: int) -> int:
    """Bytes: C, its scaled copy and its factor or inverse; W, what is added, the state, twice."""
    n = kept + dropped
    block = 8 * BLOCK * (n + 2 * BLOCK) if n > BLOCK else 0
    return max(8 * (3 * n * n + 5 * outputs * n) + block, gather_bytes(n, n, n))


def flops(kept: int, dropped: int, outputs: int) -> int:
    """If it does not converge: it may end earlier."""
    n = kept + dropped
    return n**3 + ITERATIONS * 2 * n * n * outputs


# the ridge of its minimum is the ridge of the closed form's
ADMM = Reconstruction(
    "admm", repair, solves=True, whole=True, sweep=liar.sweep, holds=holds, flops=flops
)

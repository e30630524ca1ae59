"""Ridge solve with a check on its own accuracy and a ladder of larger ridges, never silent."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from liar_ext.errors import NumericalError

Precision = Literal["auto", "float64", "float32"]
LADDER_STEPS = 8
# a line of the ladder is about 100 characters
RECORD_BYTES = 4096
# normwise backward error accepted from a float64 factorisation: 1e-16 · n with n ≤ 3e4, and slack
BACKWARD_TOLERANCE = 1e-10
REFINEMENT_STEPS = 5
# data-centre parts whose float64 rate is half of float32 or better; elsewhere it is 1/32 to 1/64
FULL_RATE_FLOAT64 = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Diagnostics:
    """How one system was solved.

    Attributes:
        ridge: relative ridge asked for; `ridge_used`: the one that held.
        strength: absolute λ that was added to the diagonal.
        condition: 2-norm condition of the Jacobi-scaled, ridged matrix, by power iteration.
        backward_error: `‖AZ−B‖ / (‖A‖‖Z‖+‖B‖)` on random combinations of the columns.
        dead: kept columns without variance, excluded with `Q = 0`.
        precision: of the factorisation that was used.
        steps: one line for each thing that had to be raised or repeated; empty when none.
    """

    ridge: float
    ridge_used: float
    strength: float
    condition: float
    backward_error: float
    dead: int
    precision: str
    steps: tuple[str, ...] = ()

    def encode(self) -> Tensor:
        """As a CPU uint8 tensor of fixed length: what a torch operator can return."""
        text = json.dumps(dataclasses.asdict(self)).encode()
        if len(text) > RECORD_BYTES:
            raise RuntimeError(f"diagnostics of {len(text)} bytes, the record holds {RECORD_BYTES}")
        return torch.tensor(list(text.ljust(RECORD_BYTES)), dtype=torch.uint8)

    @classmethod
    def decode(cls, record: Tensor) -> Diagnostics:
        """What `encode` made."""
        data = json.loads(bytes(record.tolist()))
        return cls(**{**data, "steps": tuple(data["steps"])})


def ridge_solve(
    matrix: Tensor,
    right: Tensor,
    strength: float,
    ridge: float,
    *,
    moments_dtype: torch.dtype = torch.float32,
    precision: str = "auto",
) -> tuple[Tensor, Diagnostics]:
    """Solve `(A + λI) Z = B` for symmetric positive semidefinite A.

    λ is added before the Jacobi scaling, so it is the ridge of the definition. A result is used
    only if the factorisation exists, the smallest eigenvalue of the scaled matrix is above the
    rounding of the moments, and the backward error is small; else float32 goes to float64, and
    float64 raises λ tenfold.

    Args:
        matrix: (s, s) float64; rows and columns that are zero on the diagonal are dead.
        right: (s, r) float64.
        strength: λ, absolute; ridge: the same relative to the mean diagonal, for the report.
        moments_dtype: precision the matrix was accumulated in; sets the rounding floor.
        precision: `float64`; `float32` with refinement by float64 residuals (falls back to
            float64); `auto` is float64 except on GPUs where float64 is slow.
    Returns:
        Z (s, r) float64 with zero rows for dead columns, and the Diagnostics.
    Raises:
        NumericalError: after `LADDER_STEPS` steps.
    """
    live = matrix.diagonal() > 0
    dead = int((~live).sum())
    solution = torch.zeros_like(right)
    if dead == matrix.shape[0]:
        return solution, Diagnostics(ridge, ridge, strength, 1.0, 0.0, dead, "float64")
    if dead:
        matrix, right = matrix[live][:, live], right[live]
    unit = float(matrix.diagonal().mean()) if strength == 0 else strength / ridge
    floor = torch.finfo(moments_dtype).eps
    working = _resolve(precision, matrix)
    steps: list[str] = []
    used = ridge
    while len(steps) < LADDER_STEPS:
        attempt = _attempt(matrix, right, used * unit, floor, working)
        if attempt.reason is None:
            solution[live] = attempt.solution
            return solution, Diagnostics(
                ridge,
                used,
                used * unit,
                attempt.condition,
                attempt.backward_error,
                dead,
                str(working).removeprefix("torch."),
                tuple(steps),
            )
        if working == torch.float32:
            steps.append(f"float32: {attempt.reason}; repeated in float64")
            working = torch.float64
        else:
            raised = max(used * 10, floor)
            steps.append(f"ridge {used:.1e}: {attempt.reason}; raised to {raised:.1e}")
            used = raised
    raise NumericalError(
        f"no usable factorisation of a {matrix.shape[0]}² system after {LADDER_STEPS} steps: "
        + " | ".join(steps)
    )


@dataclass(frozen=True)
class _Attempt:
    reason: str | None
    solution: Tensor
    condition: float = float("inf")
    backward_error: float = float("inf")


def _attempt(
    matrix: Tensor, right: Tensor, strength: float, floor: float, working: torch.dtype
) -> _Attempt:
    scale = (matrix.diagonal() + strength).rsqrt()
    scaled = matrix * scale[:, None] * scale
    scaled.diagonal().fill_(1.0)
    scaled_right = right * scale[:, None]
    factor, info = torch.linalg.cholesky_ex(scaled.to(working))
    if int(info) != 0:
        return _Attempt(f"not positive definite at pivot {int(info)}", right)
    largest, smallest = _extreme_eigenvalues(scaled, factor)
    if not smallest > floor:
        return _Attempt(
            f"smallest eigenvalue {smallest:.1e} is below the rounding {floor:.1e} of the moments",
            right,
        )
    solution = _substitute(factor, scaled_right)
    error = _backward_error(scaled, solution, scaled_right, largest)
    if working == torch.float32:
        for _ in range(REFINEMENT_STEPS):
            if error <= BACKWARD_TOLERANCE:
                break
            solution = solution + _substitute(factor, scaled_right - scaled @ solution)
            previous, error = error, _backward_error(scaled, solution, scaled_right, largest)
            if not error < previous:
                break
    if not error <= BACKWARD_TOLERANCE:
        return _Attempt(f"backward error {error:.1e} above {BACKWARD_TOLERANCE:.0e}", right)
    return _Attempt(None, solution * scale[:, None], largest / smallest, error)


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right.to(factor.dtype), factor).double()


def _extreme_eigenvalues(
    matrix: Tensor, factor: Tensor, iterations: int = 12
) -> tuple[float, float]:
    """Power iteration on A and, through its factor, on A⁻¹: O(s²) each step, so free."""
    vector = _probes(matrix, 1)
    low = vector
    for _ in range(iterations):
        vector = matrix @ (vector / vector.norm())
        low = _substitute(factor, low / low.norm())
    return float(vector.norm()), 1.0 / float(low.norm())


def _backward_error(matrix: Tensor, solution: Tensor, right: Tensor, norm: float) -> float:
    mix = _probes(right.T, 4)
    mixed, target = solution @ mix, right @ mix
    residual = (matrix @ mixed - target).norm()
    return float(residual / (norm * mixed.norm() + target.norm()).clamp(min=1e-300))


def _probes(like: Tensor, count: int) -> Tensor:
    # fixed seed: the same input gives the same diagnostics
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape[0], count, generator=generator, dtype=like.dtype).to(like.device)


def _resolve(precision: str, matrix: Tensor) -> torch.dtype:
    if precision != "auto":
        return {"float64": torch.float64, "float32": torch.float32}[precision]
    if matrix.device.type == "cuda":
        slow = torch.cuda.get_device_capability(matrix.device) not in FULL_RATE_FLOAT64
        return torch.float32 if slow else torch.float64
    return torch.float64

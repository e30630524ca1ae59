"""Ridge solve of a batch, with a check on its own accuracy and a ladder that is never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.attempt import Attempt, attempt
from liar_ext.ops.diagnostics import Diagnostics

Precision = Literal["auto", "float64", "float32"]
LADDER_STEPS = 8
# normwise backward error accepted from a float64 factorisation: 1e-16 · n with n ≤ 3e4, and slack
BACKWARD_TOLERANCE = 1e-10
# times the condition it estimates the forward error of Z̃ = Z/d, each kept column in its own
# deviations; float64 keeps that below this up to conditions of about 1e10
FORWARD_TOLERANCE = 1e-6
# a ridge of the mean variance leaves nothing of a repair: the ladder ends there
LARGEST_RIDGE = 1.0
# data-centre parts of today whose float64 rate is half of float32 or better
FULL_RATE_FLOAT64 = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Solved:
    """Attributes:

    solution: (b, s, r) float64, Z with zero rows for dead columns.
    shift: (b, r) float64, `P = μ_M − Zᵀ μ_S`; zeros where no means were given.
    diagnostics: one for each system.
    """

    solution: Tensor
    shift: Tensor
    diagnostics: tuple[Diagnostics, ...]


@dataclass
class _State:
    """Where one system stands on the ladder."""

    unit: float
    working: torch.dtype
    used: float = 0.0
    steps: list[str] = field(default_factory=list)


def solve(
    matrix: Tensor,
    right: Tensor,
    ridge: float,
    *,
    unit: Sequence[float] | None = None,
    mean_kept: Tensor | None = None,
    mean_dropped: Tensor | None = None,
    moments_dtype: torch.dtype = torch.float32,
    floor: float | None = None,
    precision: Precision = "auto",
) -> Solved:
    """Solve `(A + λI) Z = B`, `λ = ridge · unit`, for a batch of positive semidefinite A.

    λ is added before the Jacobi scaling, so it is the ridge of the definition (`attempt`). A result
    is used only if the factorisation exists, the smallest eigenvalue of the scaled matrix is above
    the rounding of the moments, and the backward error is small, also when the condition magnifies
    it; else float32 goes to float64, and float64 raises the ridge, at least tenfold and to 1 at
    most. Each such step is a line of that system's Diagnostics; the other systems of the batch are
    not touched by it.

    Args:
        matrix: (b, s, s) float64, both triangles; a column with a diagonal of 0 is dead.
        right: (b, s, r) float64.
        ridge: relative to `unit`; ≥ 0.
        unit: for each system what the ridge is relative to, the mean diagonal of its live columns
            when None or 0.
        mean_kept, mean_dropped: (b, s) and (b, r) float64, for P.
        moments_dtype: precision the matrix was accumulated in.
        floor: its rounding, relative to a unit diagonal; None for the epsilon of `moments_dtype`.
        precision: `float64`; `float32` with refinement by float64 residuals (falls back to
            float64); `auto` is float64 except on GPUs where float64 is slow.
    Raises:
        ValueError: shapes or dtypes do not fit together, or ridge or unit is negative or no number.
        NumericalError: one of the systems could not be solved; it says which.

    Example:
        >>> matrix = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
        >>> right = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
        >>> solve(matrix, right, 0.0).solution.flatten()
        tensor([1., 1.], dtype=torch.float64)
    """
    if matrix.ndim != 3 or right.ndim != 3:
        raise ValueError(
            f"matrix must be (batch, s, s) and right (batch, s, r); "
            f"got {tuple(matrix.shape)} and {tuple(right.shape)}"
        )
    batch = matrix.shape[0]
    if unit is not None and len(unit) != batch:
        raise ValueError(f"unit must have one number for each of {batch} systems; got {len(unit)}")
    check_not_negative("ridge", ridge)
    for value in unit or ():
        check_not_negative("unit", value)
    floor = torch.finfo(moments_dtype).eps if floor is None else floor
    working = working_dtype(precision, matrix.device)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    live = diagonal != 0
    own = diagonal.where(live, 0.0).sum(-1) / live.sum(-1).clamp(min=1)
    dead, means = (~live).sum(-1).tolist(), own.tolist()
    states = [
        _State((unit[i] if unit is not None else 0.0) or means[i], working, ridge)
        for i in range(matrix.shape[0])
    ]
    solution: Tensor | None = None
    shift: Tensor | None = None
    tried: Attempt | None = None
    size = matrix.shape[1]
    done: list[Diagnostics | None] = [None] * len(states)
    while pending := [i for i, found in enumerate(done) if found is None]:
        # one precision at a time: after a float32 failure a batch is in both
        same = [i for i in pending if states[i].working == states[pending[0]].working]
        every = len(same) == len(states)
        if every:
            # a solution that is to be repeated is as large as the right sides
            solution = shift = tried = None
        tried = attempt(
            matrix if every else matrix[same],
            right if every else right[same],
            matrix.new_tensor([states[i].used * states[i].unit for i in same]),
            mean_kept if every or mean_kept is None else mean_kept[same],
            mean_dropped if every or mean_dropped is None else mean_dropped[same],
            states[same[0]].working,
        )
        if solution is None or shift is None:
            # the last attempt at all systems: its tensors are the result unless some fail
            solution, shift = tried.solution, tried.shift
        numbers = zip(
            tried.info.tolist(),
            *(v.tolist() for v in (tried.pivot, tried.largest, tried.smallest, tried.error)),
            strict=True,
        )
        for at, (i, (info, pivot, largest, smallest, error)) in enumerate(
            zip(same, numbers, strict=True)
        ):
            state = states[i]
            condition = max(largest / smallest, 1.0) if smallest else float("inf")
            reason = _reason(info, smallest, condition, error, floor)
            if reason is not None:
                if not bool((matrix[i].sum() + right[i].sum()).isfinite()):
                    raise NumericalError(
                        f"system {i} of {batch} ({size}²) holds NaN or infinite values"
                    )
                # the smallest ridge that can help: it lifts the eigenvalues of the scaled matrix
                magnified = info == 0 and smallest > floor and error <= BACKWARD_TOLERANCE
                enough = error * largest / FORWARD_TOLERANCE if magnified else 0.0
                _climb(state, reason, max(floor, enough), f"system {i} of {batch} ({size}²)")
                continue
            if tried.solution is not solution:
                solution[i], shift[i] = tried.solution[at], tried.shift[at]
            done[i] = Diagnostics(
                ridge,
                state.used,
                state.used * state.unit,
                condition,
                error,
                dead[i],
                str(state.working).removeprefix("torch."),
                tuple(state.steps),
                pivot,
            )
    if solution is None or shift is None:
        raise ValueError("matrix holds no system: its batch is empty")
    return Solved(solution, shift, tuple(d for d in done if d is not None))


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError for what is no finite number ≥ 0."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number, 0 or more; got {value}")


def _reason(info: int, smallest: float, condition: float, error: float, floor: float) -> str | None:
    """Why an attempt is not good enough, or None. Written so that a NaN is a reason."""
    if info != 0:
        return f"not positive definite at pivot {info}"
    if not smallest > floor:
        return (
            f"smallest eigenvalue {smallest:.1e} is below the rounding {floor:.1e} of the moments"
        )
    if not error <= BACKWARD_TOLERANCE:
        return f"backward error {error:.1e} above {BACKWARD_TOLERANCE:.0e}"
    if not error * condition <= FORWARD_TOLERANCE:
        return f"backward error {error:.1e} at a condition of {condition:.1e}"
    return None


def _climb(state: _State, reason: str, least: float, which: str) -> None:
    """The next rung, or the end of the ladder."""
    raised = max(state.used * 10, least)
    single = state.working == torch.float32
    if not single and (raised > LARGEST_RIDGE or len(state.steps) == LADDER_STEPS):
        tried = " | ".join([*state.steps, f"ridge {state.used:.1e}: {reason}"])
        raise NumericalError(f"no usable factorisation of {which}: {tried}")
    if single:
        state.steps.append(f"float32: {reason}; repeated in float64")
        state.working = torch.float64
    else:
        state.steps.append(f"ridge {state.used:.1e}: {reason}; raised to {raised:.1e}")
        state.used = raised


def working_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision of the factorisation that `precision` means on `device`."""
    named = {"float64": torch.float64, "float32": torch.float32}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise ValueError(f"precision must be auto, float64 or float32; got {precision!r}")
    if device.type == "cuda":
        slow = torch.cuda.get_device_capability(device) not in FULL_RATE_FLOAT64
        return torch.float32 if slow else torch.float64
    return torch.float64

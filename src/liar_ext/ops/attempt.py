"""One attempt at a batch of ridge systems: factor, substitute, and say how good the result is.

For each system, with a unit diagonal by `d = (diag A + λ)^-1/2`:

    Ã = d (A + λI) d = L Lᵀ        Z = d L⁻ᵀ L⁻¹ (d B)        P = μ_M − Zᵀ μ_S

Nothing is raised or repeated here: a factorisation that fails is an `info` and a residual, so a
batch never waits for one of its systems, and the host never for the device. `solve` decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liar_ext.ops import backends
from liar_ext.ops.precision import no_autocast


class Attempt(NamedTuple):
    """Attributes (b systems of s kept and r dropped columns):

    solution: (b, s, r) float64, Z; rows of dead columns are zero.
    shift: (b, r) float64, P; zeros where no means were given.
    info: (b,) int32: 0, or 1 + the index of the first pivot that is not positive.
    pivot: (b,) float64: smallest pivot, the squared diagonal of L.
    largest, smallest: (b,) float64: estimated eigenvalues of Ã.
    error: (b,) float64: `‖ÃZ̃−B̃‖ / (‖Ã‖‖Z̃‖+‖B̃‖)`, of eight random combinations of the columns
        where there are more of them and nothing was refined.
    """

    solution: Tensor
    shift: Tensor
    info: Tensor
    pivot: Tensor
    largest: Tensor
    smallest: Tensor
    error: Tensor


def attempt_reference(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None = None,
    mean_dropped: Tensor | None = None,
) -> Attempt:
    """The definition, in float64: eigenvalues by `eigvalsh`, the solution by LU, system by system.

    The factorisation of a matrix that is not positive definite has no definition; its solution and
    everything that depends on it is NaN here.
    """
    matrix, right = matrix.double(), right.double()
    rows = []
    for index in range(matrix.shape[0]):
        diagonal = matrix[index].diagonal()
        # a negative diagonal is no dead column: its NaN fails the factorisation
        scale = torch.where(diagonal == 0, 0.0, (diagonal + strength[index]).rsqrt())
        scaled = matrix[index] * scale[:, None] * scale
        scaled.diagonal().copy_(1.0 + 0.0 * scale)
        target = right[index] * scale[:, None]
        eigenvalues = (
            torch.linalg.eigvalsh(scaled)
            if bool(torch.isfinite(scaled).all())
            else torch.full_like(diagonal, float("nan"))
        )
        factor, info = torch.linalg.cholesky_ex(scaled)
        good = int(info) == 0
        inner = torch.linalg.solve(scaled, target) if good else torch.full_like(target, torch.nan)
        solution = inner * scale[:, None]
        norm = eigenvalues[-1].abs() * inner.norm() + target.norm()
        shift = torch.zeros_like(right[index, 0])
        if mean_kept is not None and mean_dropped is not None:
            shift = mean_dropped[index] - solution.T @ mean_kept[index]
        rows.append(
            Attempt(
                solution,
                shift,
                info,
                factor.diagonal().square().amin() if good else right.new_tensor(torch.nan),
                eigenvalues[-1],
                eigenvalues[0],
                (scaled @ inner - target).norm() / norm.clamp(min=1e-300),
            )
        )
    return Attempt(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def attempt(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None = None,
    mean_dropped: Tensor | None = None,
    working: torch.dtype = torch.float64,
) -> Attempt:
    """Solve a batch once.

    Safe under CUDA graphs once each kernel has run, with `working` float64: nothing waits for the
    device. The backend is `LIAR_BACKEND`, or the first usable one of `backends.PREFERENCE`.

    Args:
        matrix: (b, s, s) float64, both triangles; a column with a diagonal of 0 is dead, one with
            a negative diagonal is an `info`.
        right: (b, s, r) float64. strength: (b,) float64, λ, absolute.
        mean_kept, mean_dropped: (b, s) and (b, r) float64, or None for P = 0.
        working: float64, or float32 with refinement by float64 residuals.
    Raises:
        ValueError: shapes or dtypes do not fit together.
        BackendError: `LIAR_BACKEND` names a backend that cannot run this.
    """
    _check(matrix, right, strength, mean_kept, mean_dropped, working)
    kept = None if mean_kept is None else mean_kept.detach()
    dropped = None if mean_dropped is None else mean_dropped.detach()
    with no_autocast(matrix.device):
        return Attempt(
            *solve_attempt(
                matrix.detach(), right.detach(), strength.detach(), kept, dropped, working
            )
        )


@torch.library.custom_op("liar_ext::solve", mutates_args=())
def solve_attempt(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attempt` as a torch operator, on arguments already checked."""
    run = backends.select("solve", matrix.device, working).run
    return tuple(run(matrix, right, strength, mean_kept, mean_dropped, working))


@solve_attempt.register_fake
def _(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, kept, dropped = right.shape
    one = matrix.new_empty(batch)
    return (
        matrix.new_empty(batch, kept, dropped),
        matrix.new_empty(batch, dropped),
        matrix.new_empty(batch, dtype=torch.int32),
        one,
        torch.empty_like(one),
        torch.empty_like(one),
        torch.empty_like(one),
    )


def _check(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> None:
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or matrix.shape[1] == 0:
        raise ValueError(f"matrix must be (batch, s, s) with s > 0; got {tuple(matrix.shape)}")
    batch, kept = matrix.shape[:2]
    if right.ndim != 3 or tuple(right.shape[:2]) != (batch, kept):
        raise ValueError(f"right must be ({batch}, {kept}, r); got {tuple(right.shape)}")
    if (mean_kept is None) != (mean_dropped is None):
        raise ValueError("give mean_kept and mean_dropped together, or neither")
    for name, value, shape in (
        ("right", right, tuple(right.shape)),
        ("strength", strength, (batch,)),
        ("mean_kept", mean_kept, (batch, kept)),
        ("mean_dropped", mean_dropped, (batch, right.shape[2])),
    ):
        if value is None:
            continue
        if tuple(value.shape) != shape or value.device != matrix.device:
            raise ValueError(
                f"{name} must be {shape} on {matrix.device}; "
                f"got {tuple(value.shape)} on {value.device}"
            )
        if value.dtype != torch.float64 or matrix.dtype != torch.float64:
            raise ValueError(
                f"matrix and {name} must be float64; got {matrix.dtype}, {value.dtype}"
            )
    if working not in (torch.float64, torch.float32):
        raise ValueError(f"working precision must be float64 or float32; got {working}")


@backends.register("solve", "reference")
def _reference(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> Attempt:
    return attempt_reference(matrix, right, strength, mean_kept, mean_dropped)

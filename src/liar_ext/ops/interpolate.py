"""Interpolation: predict the dropped columns from the kept ones, `x_M ≈ Qᵀ x_S + P`.

LIAR (arXiv 2407.13331). With `C = G/N − μμᵀ`, `λ = ridge · mean(diag C)`:

    Q = (C_SS + λI)⁻¹ C_SM        P = μ_M − Qᵀ μ_S

and without intercept the uncentred system, `C → G/N`, with `P = 0`. Dropping P from the centred
fit would leave a bias of `W_M P`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.ops.moments import Moments
from liar_ext.ops.solve import RECORD_BYTES, Diagnostics, Precision, ridge_solve


@dataclass(frozen=True)
class Interpolation:
    """Attributes: `Q` (|S|, |M|) and `P` (|M|), float64; how they were solved."""

    Q: Tensor
    P: Tensor
    diagnostics: Diagnostics


@dataclass(frozen=True)
class Repair:
    """Attributes: `weight` (out, |S|) = `W_S + W_M Qᵀ` and `shift` (out,) = `W_M P`, float64."""

    weight: Tensor
    shift: Tensor
    diagnostics: Diagnostics


def interpolate_reference(
    x: Tensor, keep: Tensor, drop: Tensor, ridge: float = 0.0, center: bool = True
) -> tuple[Tensor, Tensor]:
    """The definition, on raw activations `x` (T, n) in float64, by `torch.linalg.lstsq`.

    Minimises `‖X_M − X_S Q − 1Pᵀ‖²/T + λ‖Q‖²`; the ridge is `√(Tλ) I` appended as rows. The
    minimum-norm solution gives dead columns `Q = 0`.
    """
    x = x.double()
    tokens, kept, dropped = x.shape[0], x[:, keep], x[:, drop]
    moved = x - x.mean(0) if center else x
    strength = ridge * moved.square().mean(0).mean() * tokens
    rows = torch.cat([moved[:, keep], strength.sqrt() * torch.eye(keep.numel(), dtype=x.dtype)])
    target = torch.cat([moved[:, drop], torch.zeros(keep.numel(), drop.numel(), dtype=x.dtype)])
    q = torch.linalg.lstsq(rows, target, driver="gelsd").solution
    p = dropped.mean(0) - q.T @ kept.mean(0) if center else torch.zeros(drop.numel(), dtype=x.dtype)
    return q, p


def interpolate(
    moments: Moments,
    keep: Tensor,
    drop: Tensor,
    *,
    ridge: float,
    center: bool = True,
    precision: Precision = "auto",
) -> Interpolation:
    """Solve for Q and P from Moments.

    Args:
        moments: statistics of the Site's columns (the kept panel is enough when `ridge` is 0).
        keep, drop: int64 column indices S and M; together a partition of the columns.
        ridge: λ relative to the mean variance (mean square without `center`); ≥ 0.
        center: fit the intercept P.
        precision: see `ridge_solve`.
    Raises:
        ValueError: keep and drop are not a partition.
        InputError: NaN or infinite Moments.
        NumericalError: no ridge on the ladder gave a usable factorisation.
    """
    q, p, record = solve_interpolation(
        moments.gram,
        moments.sum,
        moments.count,
        moments.order,
        moments.mirrored,
        keep,
        drop,
        ridge,
        center,
        precision,
    )
    moments.mirrored = True
    return Interpolation(q, p, Diagnostics.decode(record))


@torch.library.custom_op("liar_ext::interpolate", mutates_args=("gram",))
def solve_interpolation(
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
    order: Tensor | None,
    mirrored: bool,
    keep: Tensor,
    drop: Tensor,
    ridge: float,
    center: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`interpolate` as a torch operator on the tensors of a Moments.

    `gram` is mutated: its upper triangle gets a copy of the lower one. The third result is the
    encoded Diagnostics.
    """
    moments = Moments(count, sum, gram, order, mirrored)
    system = _system(moments, keep, drop, ridge, center)
    solution, diagnostics = ridge_solve(
        system.kept,
        system.cross,
        system.strength(ridge),
        ridge,
        moments_dtype=gram.dtype,
        precision=precision,
    )
    mean = moments.mean()
    p = mean[drop] - solution.T @ mean[keep] if center else torch.zeros_like(mean[drop])
    return solution, p, diagnostics.encode()


@solve_interpolation.register_fake
def _(
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
    order: Tensor | None,
    mirrored: bool,
    keep: Tensor,
    drop: Tensor,
    ridge: float,
    center: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        sum.new_empty(keep.numel(), drop.numel()),
        sum.new_empty(drop.numel()),
        torch.empty(RECORD_BYTES, dtype=torch.uint8),
    )


def repair(
    moments: Moments,
    weight: Tensor,
    keep: Tensor,
    drop: Tensor,
    *,
    ridge: float,
    center: bool = True,
    precision: Precision = "auto",
) -> Repair:
    """Fold the Interpolation into a consumer weight (out, n): `W' = W_S + W_M Qᵀ`, `W_M P`.

    Only `Q W_Mᵀ` is wanted, so the right-hand side is `C_SM W_Mᵀ` (out columns) when that is
    narrower than `C_SM` (|M| columns): the same result, for less.
    """
    system = _system(moments, keep, drop, ridge, center)
    kept_weight, dropped_weight = weight[:, keep].double(), weight[:, drop].double()
    fold_first = weight.shape[0] < drop.numel()
    right = system.cross @ dropped_weight.T if fold_first else system.cross
    solution, diagnostics = ridge_solve(
        system.kept,
        right,
        system.strength(ridge),
        ridge,
        moments_dtype=moments.gram.dtype,
        precision=precision,
    )
    carried = solution.T if fold_first else dropped_weight @ solution.T
    mean = moments.mean()
    shift = dropped_weight @ mean[drop] - carried @ mean[keep]
    return Repair(kept_weight + carried, shift if center else torch.zeros_like(shift), diagnostics)


@dataclass(frozen=True)
class _System:
    kept: Tensor
    cross: Tensor
    mean_diagonal: float

    def strength(self, ridge: float) -> float:
        return ridge * self.mean_diagonal


def _system(moments: Moments, keep: Tensor, drop: Tensor, ridge: float, center: bool) -> _System:
    _check_partition(moments, keep, drop)
    kept, cross = moments.second(keep, keep), moments.second(keep, drop)
    values = (moments.sum, kept, cross)
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise InputError("the Moments hold NaN or infinite values; check the activations")
    if moments.complete:
        mean_diagonal = float((moments.variance() if center else moments.diagonal()).mean())
    elif ridge > 0:
        raise ValueError("a ridge is relative to all columns: accumulate the whole triangle")
    else:
        mean_diagonal = 0.0
    squares = kept.diagonal().clone()
    if center:
        mean = moments.mean()
        kept = kept - mean[keep, None] * mean[None, keep]
        cross = cross - mean[keep, None] * mean[None, drop]
    # a centred variance below the rounding of its own mean square is not a variance: constant
    # columns came out at up to 30 eps after 20000 tokens in float32
    noise = 64 * torch.finfo(moments.gram.dtype).eps * squares
    dead = kept.diagonal() <= (noise if center else torch.zeros_like(noise))
    kept[dead], kept[:, dead], cross[dead] = 0.0, 0.0, 0.0
    return _System(kept, cross, mean_diagonal)


def _check_partition(moments: Moments, keep: Tensor, drop: Tensor) -> None:
    together = torch.cat([keep, drop]).sort().values
    expected = torch.arange(moments.columns, device=together.device)
    if together.shape != expected.shape or not bool(torch.equal(together, expected)):
        raise ValueError(
            f"keep ({keep.numel()}) and drop ({drop.numel()}) must be a partition of the "
            f"{moments.columns} columns"
        )

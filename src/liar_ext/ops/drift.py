"""Drift-aware repair: inputs from the pruned path, targets from the dense one.

A consumer W that gets `x` in the dense model gets `x̂` once layers before it were pruned. Here the
kept columns of x̂ aim at what W makes of x:

    minimise  E‖W' x̂_S + b' − (W x + b)‖² + λ‖W' − W_S‖²

which is OSSCAR's `--fullseq` (arXiv 2403.12983) up to the ridge. With the **drift** `z = W x − W x̂`
of the consumer's output, and covariances (or second moments, without an intercept) of x̂,

    D = (W_M C_MS + Cov(z, x̂_S)) (C_SS + λI)⁻¹      W' = W_S + D
    b' = b + μ_z + W_M μ_M − D μ_S

- The ridge pulls to W_S, not to zero as in `W Cov(x, x̂_S)(C_SS + λI)⁻¹`: with z = 0 this is the
  repair of `ops.interpolate` with the same λ, and λ → ∞ leaves the consumer as it was.
- Statistics of z, not of `W x` or of x: `Σ x x̂ᵀ` would be n × n, and from `Σ W x x̂ᵀ` the right side
  is a difference of sums that agree to many digits where little has drifted. z is as wide as the
  output, small where the drift is, and zero to the bit where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.ops.cross import CrossMoments
from liar_ext.ops.interpolate import Repair, fold, repair_bytes
from liar_ext.ops.moments import ColumnMoments, Moments, spans
from liar_ext.ops.residual import residual_bytes, residual_energies
from liar_ext.ops.solve import Precision
from liar_ext.ops.system import cross_block, kept_system


@dataclass(frozen=True)
class Drift:
    """Statistics of a consumer's output on both paths, over the tokens of some Moments of x̂.

    Attributes:
        pairs: of z (out) and x̂ (n): `Σ z x̂ᵀ` (out, n), sums and count.
        change: column statistics of z (out); dense: of the dense output y, with or without its
            bias.
    """

    pairs: CrossMoments
    change: ColumnMoments
    dense: ColumnMoments

    @classmethod
    def zeros(
        cls,
        outputs: int,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Drift:
        """Empty ones."""
        return cls(
            CrossMoments.zeros(outputs, columns, dtype=dtype, device=device),
            ColumnMoments.zeros(outputs, device),
            ColumnMoments.zeros(outputs, device),
        )

    @property
    def outputs(self) -> int:
        return self.pairs.cross.shape[0]

    def mean(self) -> Tensor:
        """`μ_z`, (out,) float64."""
        return self.pairs.sum_x / self.pairs.count.clamp(min=1)

    def rows(self, part: slice) -> Drift:
        """Of these output rows only."""
        p = self.pairs
        return Drift(
            CrossMoments(p.count, p.sum_x[part], p.sum_y, p.cross[part]),
            *(
                ColumnMoments(c.count, c.sum[part], c.squares[part])
                for c in (self.change, self.dense)
            ),
        )

    def with_columns(self, columns: Tensor, center: bool) -> Tensor:
        """`Cov(z, x̂)`, or `E z x̂ᵀ` without `center`, for some columns, (out, ·) float64."""
        count = self.pairs.count.clamp(min=1)
        block = self.pairs.cross[:, columns].double().div_(count)
        if center:
            block.addr_(self.mean(), self.pairs.sum_y[columns] / count, alpha=-1)
        return block


def drift_reference(
    dense: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    ridge: float = 0.0,
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """The definition, on raw inputs of both paths in float64, by `torch.linalg.lstsq`.

    Minimises `‖X̂_S Dᵀ + 1δᵀ − (X Wᵀ − X̂_S W_Sᵀ)‖²/T + λ‖D‖²`; the ridge is `√(Tλ) I` appended as
    rows, λ relative to the mean variance of x̂ (mean square without `center`).

    Args:
        dense: inputs x of the dense path (T, n); x: x̂ of the pruned one, of the same tokens.
        weight: W (out, n); keep: S.
    Returns:
        `W'` (out, |S|) and `b' − b` (out,), zeros without `center`.
    """
    dense, x, weight = dense.double(), x.double(), weight.double()
    tokens, kept, own = x.shape[0], x[:, keep], weight[:, keep]
    target = dense @ weight.T - kept @ own.T
    square = (x - x.mean(0)).square() if center else x.square()
    strength = ridge * square.mean(0).mean() * tokens
    rows, right = (kept - kept.mean(0), target - target.mean(0)) if center else (kept, target)
    rows = torch.cat([rows, strength.sqrt() * torch.eye(keep.numel(), dtype=x.dtype)])
    right = torch.cat([right, torch.zeros(keep.numel(), len(weight), dtype=x.dtype)])
    change = torch.linalg.lstsq(rows, right, driver="gelsd").solution.T
    shift = target.mean(0) - change @ kept.mean(0) if center else x.new_zeros(len(weight))
    return own + change, shift


def drift_residual_reference(
    dense: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Tensor,
    new_weight: Tensor,
    shift: Tensor | None = None,
) -> float:
    """The definition, on raw inputs of both paths in float64.

    Mean squared error of the pruned output against the dense path's, over the mean squared
    deviation of the latter from its mean.
    """
    wanted = dense.double() @ weight.double().T
    error = x[:, keep].double() @ new_weight.double().T - wanted
    if shift is not None:
        error = error + shift.double()
    return float(error.square().sum() / (wanted - wanted.mean(0)).square().sum())


def repair_drifted(
    moments: Moments,
    drift: Drift,
    weight: Tensor,
    keep: Tensor,
    drop: Tensor,
    *,
    ridge: float,
    center: bool = True,
    precision: Precision = "auto",
) -> Repair:
    """`W'` and `b' − b` for the dense path's output, from statistics.

    One system of |S| with out right sides: what the drift asks for is no combination of the dropped
    columns, so that none of the other routes of `interpolate.repair` is open. `drop` may be empty:
    what was kept whole has drifted, too.

    Args:
        moments: of x̂; drift: of the rows of `weight` (out, n).
        keep, drop, ridge, center, precision: as in `interpolate`.
    Raises:
        ValueError: the weight has other rows or columns than the statistics, or what `interpolate`
            raises.
        InputError: NaN, infinite or empty statistics.
        NumericalError: no ridge on the ladder gave a usable factorisation.
    """
    weight = weight.detach()
    _check(moments, drift, weight)
    system = kept_system(moments, keep, drop, ridge, center)
    right = cross_block(moments, keep, drop, center, system.dead, weight)
    for start, stop in spans(0, keep.numel()):
        right[start:stop] += drift.with_columns(keep[start:stop], center).T
    right[system.dead] = 0.0
    if not bool(right.sum().isfinite() & drift.pairs.sum_x.sum().isfinite()):
        raise InputError("the drift holds NaN or infinite values; check the dense activations")
    solved = system.solve(right, ridge, moments.gram.dtype, precision)
    # as large as all that follows
    del system, right
    change = solved.solution[0].T.contiguous()
    diagnostics = solved.diagnostics[0]
    del solved
    found = fold(change, moments, weight, keep, drop, center, diagnostics)
    if center:
        found.shift.add_(drift.mean())
    return found


def drift_repair_bytes(kept: int, dropped: int, outputs: int, rows: int | None = None) -> int:
    """Most bytes that `repair_drifted` holds beside its arguments; as `interpolate.repair_bytes`.

    Blocks of `Cov(z, x̂_S)` are no larger than those of C_SM and W_M, which are gone by then.
    """
    return repair_bytes(kept, dropped, outputs, rows, route="fold first")


def drift_energies(
    moments: Moments,
    drift: Drift,
    weight: Tensor,
    keep: Tensor,
    new_weight: Tensor,
    shift: Tensor | None = None,
) -> tuple[float, float]:
    """Energies of the error against the dense path's output, and of that output.

    With `D = [W'_S − W_S | −W_M]`, C and μ of x̂, and δ = b' − b, for each row i

        error_i = d_i C d_iᵀ − 2 d_i Cov(x̂, z_i) + Var z_i + (d_i μ + δ_i − μ_z,i)²
        dense_i = max(Var y_i, eps · E y_i²)

    Sums over rows, as in `residual.residual_energies`, which does the first and the last term.

    Args:
        moments: of x̂, the whole triangle; drift: of the rows of `weight` (out, n).
        new_weight: (out, |S|); shift: δ (out,) or None.
    Raises:
        ValueError: shapes do not fit together, or the Moments lack the dropped × dropped block.
    """
    weight, new_weight = weight.detach(), new_weight.detach()
    _check(moments, drift, weight)
    left = -drift.mean()
    if shift is not None:
        left = left + shift.double()
    error = residual_energies(moments, weight, keep, new_weight, left)[0]
    error += float(drift.change.variance().sum())
    dropped = torch.ones(weight.shape[1], dtype=torch.bool, device=keep.device)
    dropped[keep] = False
    for start, stop in spans(0, keep.numel()):
        part = keep[start:stop]
        change = new_weight[:, start:stop].double() - weight[:, part].double()
        error -= 2 * float((change * drift.with_columns(part, True)).sum())
    rest = dropped.nonzero().flatten()
    for start, stop in spans(0, rest.numel()):
        part = rest[start:stop]
        error += 2 * float((weight[:, part].double() * drift.with_columns(part, True)).sum())
    eps = torch.finfo(moments.gram.dtype).eps
    dense = torch.maximum(drift.dense.variance(), eps * drift.dense.diagonal())
    return error, float(dense.sum())


def drift_residual_bytes(columns: int, outputs: int, kept: int | None = None) -> int:
    """Most bytes that `drift_energies` holds beside its arguments: those of `residual_energies`,
    which are gone before blocks of `Cov(z, x̂)` come."""
    return residual_bytes(columns, outputs, kept)


def _check(moments: Moments, drift: Drift, weight: Tensor) -> None:
    shape = (drift.outputs, moments.columns)
    if tuple(weight.shape) != shape or tuple(drift.pairs.cross.shape) != shape:
        raise ValueError(
            f"weight must be {shape}, a row for each of the drift and a column for each of the "
            f"Moments; got {tuple(weight.shape)} and a drift of {tuple(drift.pairs.cross.shape)}"
        )
    if int(drift.pairs.count) != int(moments.count):
        raise ValueError(
            f"the drift is of {int(drift.pairs.count)} tokens, the Moments of {int(moments.count)}"
        )

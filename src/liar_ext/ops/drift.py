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

So the drift is a further term on the right side of `system.folded_system`, and of the errors that
`residual` measures; whatever takes a `drift` there aims at the dense path's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops.cross import CrossMoments
from liar_ext.ops.moments import ColumnMoments, Moments


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

    def __sub__(self, other: Drift) -> Drift:
        """Of the tokens of `self` that are not in `other`, which has some of them."""
        return Drift(self.pairs - other.pairs, self.change - other.change, self.dense - other.dense)

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


@dataclass(frozen=True)
class Sample:
    """Statistics of some tokens at a Site.

    Attributes: `moments` of its inputs; `drift` of its output, None where there is one path.
    """

    moments: Moments
    drift: Drift | None = None

    def __sub__(self, other: Sample) -> Sample:
        """Of the tokens of `self` that are not in `other`, which has some of them."""
        drift = None
        if self.drift is not None:
            assert other.drift is not None, "both are of one path, or both of two"
            drift = self.drift - other.drift
        return Sample(self.moments - other.moments, drift)

    def rows(self, part: slice) -> Sample:
        """With the drift of these output rows only."""
        return Sample(self.moments, None if self.drift is None else self.drift.rows(part))


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


def check_drift(drift: Drift, moments: Moments, weight: Tensor) -> None:
    """Raises ValueError unless they are of the same tokens, rows and columns."""
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

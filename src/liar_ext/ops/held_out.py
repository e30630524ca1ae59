"""The error of many repairs of one selection on tokens that they were not fitted to, from Moments.

For `W' = W_S + Zᵀ` fitted with an intercept that gives it the mean output of W on the tokens of the
fit (mean μ), the error on held-out tokens (mean μ_h, covariance C_h) is that of deviations from μ:

    E_h‖W'x_S + b' − Wx − b‖² = tr(Zᵀ K_SS Z) − 2 tr(Zᵀ K_SM W_Mᵀ) + tr(W_M K_MM W_Mᵀ)

with `K = C_h + (μ_h − μ)(μ_h − μ)ᵀ`, or `G_h/N_h` without an intercept. Only the first two terms
depend on Z, and the second one's matrix is made once. Its definition on raw activations is
`residual_reference` of the held-out ones.

Where the target is the dense path's output, which differs by the drift z, `K_Sz` is added to
`K_SM W_Mᵀ`, and the last term is the error of `W_S` against that output; the definition is
`drift_residual_reference`.
"""

from __future__ import annotations

from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.ops.drift import Sample
from liar_ext.ops.moments import BLOCK, gather_bytes, spans
from liar_ext.ops.residual import residual_bytes, residual_energies


class HeldOut:
    """Errors of repairs of W (out, n), sums over its rows: those of slices of rows add up.

    Args:
        fitted, held: of the tokens of the fits and of the others; the whole triangle, and the drift
            of the rows of W if there are two paths.
        weight: dense (out, n); keep, drop: columns S and M; center: fits have an intercept.
    Attributes:
        dense: energy of the dense output on the held-out tokens, what errors are relative to.
    Raises:
        InputError: one of the two has no tokens.
    """

    def __init__(
        self,
        fitted: Sample,
        held: Sample,
        weight: Tensor,
        keep: Tensor,
        drop: Tensor,
        center: bool,
    ) -> None:
        tokens, left = int(held.moments.count), int(fitted.moments.count)
        if left <= 0 or tokens == 0:
            raise InputError(
                f"--ridge auto: {tokens} tokens are held out and {left} are left; give more "
                "calibration tokens or a number"
            )
        self._held, self._keep, self._center = held.moments, keep, center
        self._mean, self._fitted = held.moments.mean(), fitted.moments.mean()
        shift = None
        if center:
            shift = weight.new_zeros(weight.shape[0]).double()
            for start, stop in spans(0, drop.numel()):
                part = drop[start:stop]
                shift += weight[:, part].double() @ self._fitted[part]
            if fitted.drift is not None:
                shift += fitted.drift.mean()
        # of Z = 0: the last term
        self._base, self.dense = residual_energies(
            held.moments, weight, keep, weight[:, keep], shift, held.drift
        )
        dropped = weight[:, drop].double().T
        self._right = dropped.new_empty(keep.numel(), weight.shape[0])
        for start, stop in spans(0, keep.numel()):
            part = keep[start:stop]
            self._right[start:stop] = self._block(part, drop) @ dropped
            if held.drift is None or fitted.drift is None:
                continue
            beside = held.drift.with_columns(part, center)
            if center:
                off = held.drift.mean() - fitted.drift.mean()
                beside.addr_(off, self._mean[part] - self._fitted[part])
            self._right[start:stop] += beside.T

    def error(self, change: Tensor) -> float:
        """Of `W' = W_S + changeᵀ`, change (|S|, out) float64."""
        total = self._base - 2.0 * float((change * self._right).sum())
        for start, stop in spans(0, self._keep.numel()):
            moved = self._block(self._keep[start:stop], self._keep) @ change
            total += float((moved * change[start:stop]).sum())
        return total

    def _block(self, rows: Tensor, cols: Tensor) -> Tensor:
        """`K[rows, cols]`, float64."""
        block = self._held.second(rows, cols)
        if self._center:
            off = self._mean - self._fitted
            block.addr_(self._mean[rows], self._mean[cols], alpha=-1)
            block.addr_(off[rows], off[cols])
        return block


def held_out_bytes(kept: int, dropped: int, rows: int) -> int:
    """Most bytes that HeldOut holds for `rows` rows of W beside its arguments, on float64.

    `K_SM W_Mᵀ`, and W_M, a block of K and its product with a change; blocks of `K_Sz` are smaller.
    """
    block = min(kept, BLOCK)
    own = 8 * rows * kept
    made = 8 * rows * dropped + gather_bytes(block, max(kept, dropped), kept + dropped)
    return max(own + made + 8 * rows * block, residual_bytes(kept + dropped, rows, kept))


def held_out_flops(kept: int, dropped: int, outputs: int) -> tuple[int, int]:
    """Floating-point operations of making a HeldOut, and of one error."""
    columns = kept + dropped
    made = outputs * (columns**2 + kept**2 + 2 * kept * dropped)
    return made, 2 * outputs * kept**2

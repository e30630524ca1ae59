"""What a pruned consumer gets wrong, from Moments alone: `E‖(W'x_S + b') − (Wx + b)‖²`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from liar_ext.ops.drift import Drift, check_drift
from liar_ext.ops.moments import BLOCK, Moments, gather_bytes, spans
from liar_ext.ops.precision import full_precision, no_autocast, slow_float64

# output rows that one pass over C serves. Gathering and centring C took a third of the time with
# 2048 rows of 11008 columns; with all 4096 the pass still holds less than the repair before it
ROW_BLOCK = 4096
# rows that try float32 first: a repair too good for it would have wasted a third of the time
TRIAL_ROWS = 128
# relative error that float32 products may add to an energy, by the bound of `_single_error`; what
# the rounding of float32 Moments makes of a residual is up to 2.6e-5 (benchmarks/exactness.py)
SINGLE_TOLERANCE = 2e-5


def residual_reference(
    x: Tensor, weight: Tensor, keep: Tensor, new_weight: Tensor, shift: Tensor | None = None
) -> float:
    """The definition, on raw activations `x` (T, n) in float64.

    Mean squared output error over the mean squared deviation of the dense output from its mean.
    """
    x, weight = x.double(), weight.double()
    error = x[:, keep] @ new_weight.double().T - x @ weight.T
    if shift is not None:
        error = error + shift.double()
    dense = (x - x.mean(0)) @ weight.T
    return float(error.square().sum() / dense.square().sum())


def relative_residual(
    moments: Moments, weight: Tensor, keep: Tensor, new_weight: Tensor, shift: Tensor | None = None
) -> float:
    """The same from Moments, for any reconstruction: `relative_residual_of(residual_energies)`.

    Args:
        weight: dense consumer weight (out, n); new_weight: (out, |S|); shift: δ (out,) or None.
    Returns:
        0 for a perfect repair, 1 for a consumer that outputs only its mean.
    Raises:
        ValueError: shapes do not fit together, or the Moments lack the dropped × dropped block.
    """
    return relative_residual_of(residual_energies(moments, weight, keep, new_weight, shift))


def relative_residual_of(energies: Sequence[float]) -> float:
    """Error over dense energy, from `residual_energies` or their sum over slices of the rows."""
    error, dense = energies
    return max(error, 0.0) / max(dense, torch.finfo(torch.float64).tiny)


def residual_energies(
    moments: Moments,
    weight: Tensor,
    keep: Tensor,
    new_weight: Tensor,
    shift: Tensor | None = None,
    drift: Drift | None = None,
) -> tuple[float, float]:
    """Energies of the output error and of the dense output, sums over the rows of W.

    With `D = [W'_S − W_S | −W_M]`, `C = G/N − μμᵀ` and δ = b' − b, for each row i

        error_i = d_i C d_iᵀ + (d_i μ + δ_i)²        dense_i = max(w_i C w_iᵀ, eps · E(w_i x)²)

    with the eps of the Moments: an output that does not vary has no residual to compare with, and
    its rounding stands in. Both are sums over rows, so those of disjoint slices of W add up.

    Three of the quadratic forms are shared: `W_M C_MM W_Mᵀ`, and `W_M C_MS` which is multiplied
    with D_S and with W_S. That makes out (n² + s²) operations, where two forms over all columns
    make 2 out n². They are done in float32, with float64 sums over blocks of columns, where the
    Moments are float32, float64 takes longer, and that is known to cost less than
    `SINGLE_TOLERANCE`; else in float64.

    With the drift z of the rows of W, the error is that against the dense path's output y, and the
    dense energy is that of y:

        error_i = d_i C d_iᵀ − 2 d_i Cov(x̂, z_i) + Var z_i + (d_i μ + δ_i − μ_z,i)²
        dense_i = max(Var y_i, eps · E y_i²)

    Args:
        moments: the whole triangle, in any order.
        weight: dense consumer weight (out, n); new_weight: (out, |S|); shift: δ (out,) or None.
        drift: of the rows of `weight`, over the tokens of the Moments, or None.
    Returns:
        error and dense energy. The error is not clamped: rounding can leave it below zero.
    Raises:
        ValueError: shapes do not fit together, or the Moments lack the dropped × dropped block.
    """
    weight, new_weight = weight.detach(), new_weight.detach()
    outputs, columns = weight.shape
    if columns != moments.columns or tuple(new_weight.shape) != (outputs, keep.numel()):
        raise ValueError(
            f"weight must be (out, {moments.columns}) and new_weight (out, {keep.numel()}); "
            f"got {tuple(weight.shape)} and {tuple(new_weight.shape)}"
        )
    if drift is not None:
        check_drift(drift, moments, weight)
        shift = -drift.mean() if shift is None else shift.double() - drift.mean()
    dropped = torch.ones(columns, dtype=torch.bool, device=keep.device)
    dropped[keep] = False
    order = torch.cat([keep, dropped.nonzero().flatten()])
    eps = torch.finfo(moments.gram.dtype).eps
    working = moments.gram.dtype
    if weight.is_cuda and not slow_float64(weight.device):
        working = torch.float64
    error = dense = 0.0
    with no_autocast(weight.device), full_precision():
        trial = TRIAL_ROWS if working == torch.float32 else 0
        edges = {0, *range(min(trial, outputs), outputs, ROW_BLOCK), outputs}
        for start, stop in pairwise(sorted(edges)):
            rows = slice(start, stop)
            part = (weight[rows], new_weight[rows], order, keep.numel())
            found = _row_energies(moments, *part, working)
            if working == torch.float32 and not _single_is_enough(found, columns, outputs):
                # a repair this good is good in all rows: the next block is float64 at once
                working = torch.float64
                found = _row_energies(moments, *part, working)
            (error_rows, dense_rows), (error_mean, dense_mean), _ = found
            if shift is not None:
                error_mean = error_mean + shift.detach()[rows].double()
            error += float(error_rows.sum() + error_mean.square().sum())
            floor = eps * (dense_rows.abs() + dense_mean.square())
            dense += float(torch.maximum(dense_rows, floor).sum())
    if drift is not None:
        error += _drift_energy(drift, weight, order, new_weight)
        own = drift.dense
        dense = float(torch.maximum(own.variance(), eps * own.diagonal()).sum())
    return error, dense


def _drift_energy(drift: Drift, weight: Tensor, order: Tensor, new_weight: Tensor) -> float:
    """`Σ_i Var z_i − 2 d_i Cov(x̂, z_i)`, by blocks of columns."""
    kept = new_weight.shape[1]
    total = float(drift.change.variance().sum())
    for start, stop in [*spans(0, kept), *spans(kept, len(order))]:
        part = order[start:stop]
        change = -weight[:, part].double()
        if stop <= kept:
            change += new_weight[:, start:stop]
        total -= 2 * float((change * drift.with_columns(part, True)).sum())
    return total


def residual_bytes(columns: int, outputs: int, kept: int | None = None) -> int:
    """Most bytes that `residual_energies` holds beside its arguments, in float64.

    Args:
        columns, outputs: n and rows of W; kept: s, or None for the worst, all columns.
    Returns:
        8 (r (n + s) + B n + 4 r B) + a gather, with r rows and B columns of a block: `[D_S; W_S]`
        and W_M; a panel of C; its product with `[D_S; W_S]`, twice. All are gone before blocks of
        `Cov(x̂, z)` come, where there is a drift.
    """
    kept = columns if kept is None else kept
    rows, block = min(outputs, ROW_BLOCK), min(columns, BLOCK)
    held = rows * (columns + kept)
    products = 2 * (2 * rows * min(block, max(kept, 1)))
    return 8 * held + max(8 * (block * columns + products), gather_bytes(block, columns, columns))


# of rows: (error, dense) variances, means, and sizes of what was added up to the variances
_Rows = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _row_energies(
    moments: Moments,
    weight: Tensor,
    new_weight: Tensor,
    order: Tensor,
    kept: int,
    working: torch.dtype,
) -> _Rows:
    """`d_i C d_iᵀ` and `w_i C w_iᵀ` of each row, `d_i μ` and `w_i μ`, all float64.

    Products in `working`; centring, and sums over blocks of columns, in float64.
    """
    rows, columns = weight.shape
    mean, variance = moments.mean()[order], moments.variance()[order].to(working)
    both = weight.new_empty(2 * rows, kept, dtype=working)
    dropped = weight.new_empty(rows, columns - kept, dtype=working)
    own = torch.zeros(2 * rows, dtype=torch.float64, device=weight.device)
    cross, means, sizes = torch.zeros_like(own), torch.zeros_like(own), torch.zeros_like(own)
    shared, shared_mean, shared_size = (torch.zeros_like(own[:rows]) for _ in range(3))
    for start, stop in spans(0, kept):
        old = weight[:, order[start:stop]].double()
        # the difference of what agrees to many digits, before any rounding
        change = new_weight[:, start:stop].double() - old
        both[:rows, start:stop], both[rows:, start:stop] = change, old
        means[:rows] += change @ mean[start:stop]
        means[rows:] += old @ mean[start:stop]
        del old, change
    for start, stop in spans(kept, columns):
        old = weight[:, order[start:stop]].double()
        dropped[:, start - kept : stop - kept] = old
        shared_mean += old @ mean[start:stop]
        del old
    for start, stop in spans(0, kept):
        panel = _panel(moments, order, mean, start, stop).to(working)
        left = both[:, start:stop]
        own += 2 * _dots(both[:, start:] @ panel[:, : kept - start].T, left)
        side = dropped @ panel[:, kept - start :].T
        cross[:rows] += _dots(side, left[:rows])
        cross[rows:] += _dots(side, left[rows:])
        sizes += left.square() @ variance[start:stop]
        del panel, side
    for start, stop in spans(kept, columns):
        panel = _panel(moments, order, mean, start, stop).to(working)
        left = dropped[:, start - kept : stop - kept]
        shared += 2 * _dots(dropped[:, start - kept :] @ panel.T, left)
        shared_size += left.square() @ variance[start:stop]
        del panel
    sizes += own
    error, dense = own.split(rows)
    return (
        (error - 2 * cross[:rows] + shared, dense + 2 * cross[rows:] + shared),
        (means[:rows] - shared_mean, means[rows:] + shared_mean),
        (sizes[:rows] + shared_size + shared, sizes[rows:] + shared_size + shared),
    )


def _panel(moments: Moments, order: Tensor, mean: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of C from the diagonal on, in `order`, (·, n − start) float64.

    The block on the diagonal is halved: twice a product with the panel is then a product with
    the symmetric matrix.
    """
    panel = moments.second(order[start:stop], order[start:])
    panel.addr_(mean[start:stop], mean[start:], alpha=-1)
    panel[:, : stop - start] *= 0.5
    return panel


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot products of rows, float64. The sum over a block of columns is pairwise in torch."""
    return (left * right).sum(1).double()


def _single_is_enough(found: _Rows, columns: int, outputs: int) -> bool:
    """Whether float32 products leave both energies within `SINGLE_TOLERANCE`. NaN is no.

    `found` are some of the `outputs` rows, and stand for all of them.

    A dot product of K terms has K roundings u of its partial sums, and a partial sum is the
    covariance of a part of the output with a column: at most its deviation times σ_j. Roundings
    are as often up as down, so the form `Σ_j d_ij p_ij` is off by at most `u √n · size_i` (one
    deviation), where size_i adds up `Σ_j d_ij² σ_j²` and the forms over S and over M, which are
    what cancels; and rows by the root of their squares. Rounding C itself adds `u Σ size_i`.

    The true error was 1/20 to 1/600 of this, for residuals from 1e-7 to 0.5, 8 to 512 rows and
    1024 to 2048 columns; it grows as 1/residual, so that what is repaired to about 2 % or better
    goes to float64.
    """
    unit = torch.finfo(torch.float32).eps / 2
    for energy, size in zip(found[0], found[2], strict=True):
        # of `outputs` rows like these the deviations add up by their squares
        scatter = math.sqrt(columns * size.numel() / outputs) * size.norm()
        bound = unit * float(size.sum() + scatter)
        if not bound <= SINGLE_TOLERANCE * float(energy.sum()):
            return False
    return True

"""The system of equations behind a repair, from Moments: `C_SS` and blocks of `C_SM`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError
from liar_ext.ops.drift import Drift, check_drift
from liar_ext.ops.moments import BLOCK, Moments, gather_bytes, spans
from liar_ext.ops.solve import Precision, Solved, solve

# norm of the rounding of a scaled, centred Gram matrix over eps · mean square / variance: 5.4, 6.2
# and 6.3 for means of 3, 10 and 30 deviations (64 columns, 20000 tokens, float32)
ROUNDING = 6.0


@dataclass(frozen=True)
class System:
    """`C_SS` (s, s) float64 and its dead columns (s,); mean(diag C); the rounding of its scale."""

    kept: Tensor
    dead: Tensor
    mean_diagonal: float
    floor: float

    def solve(
        self, right: Tensor, ridge: float, moments_dtype: torch.dtype, precision: Precision
    ) -> Solved:
        return solve(
            self.kept[None],
            right[None],
            ridge,
            unit=[self.mean_diagonal],
            moments_dtype=moments_dtype,
            floor=self.floor,
            precision=precision,
        )


def kept_system(moments: Moments, keep: Tensor, drop: Tensor, ridge: float, center: bool) -> System:
    """The system of the kept columns.

    Raises:
        ValueError: keep and drop are no partition, or a ridge is asked of an incomplete triangle.
        InputError: NaN, infinite or empty Moments.
    """
    check_partition(moments, keep, drop)
    if int(moments.count) == 0:
        raise InputError("the Moments hold no tokens; nothing was accumulated")
    kept = moments.second(keep, keep)
    _check_finite(moments.sum, kept)
    if moments.complete:
        mean_diagonal = float((moments.variance() if center else moments.diagonal()).mean())
    elif ridge > 0:
        raise ValueError("a ridge is relative to all columns: accumulate the whole triangle")
    else:
        mean_diagonal = 0.0
    squares = kept.diagonal().clone()
    if center:
        mean = moments.mean()
        kept.addr_(mean[keep], mean[keep], alpha=-1)
    # a centred variance below the rounding of its own mean square is not a variance: constant
    # columns came out at up to 30 eps after 20000 tokens in float32
    eps = torch.finfo(moments.gram.dtype).eps
    noise = 64 * eps * squares
    dead = kept.diagonal() <= (noise if center else torch.zeros_like(noise))
    kept[dead], kept[:, dead] = 0.0, 0.0
    # G is rounded at the size of its squares: beside a unit variance that is so many times more
    above = (squares / kept.diagonal())[~dead]
    excess = float(above.mean()) - 1.0 if above.numel() else 0.0
    return System(kept, dead, mean_diagonal, eps * (1.0 + ROUNDING * max(excess, 0.0)))


def cross_block(
    moments: Moments,
    keep: Tensor,
    drop: Tensor,
    center: bool,
    dead: Tensor,
    folded: Tensor | None = None,
) -> Tensor:
    """`C_SM` (s, m), or `C_SM W_Mᵀ` (s, out) with W (out, n) `folded` in; zero in dead rows.

    Folded by blocks of rows, so that C_SM is never there as a whole.
    """
    mean = moments.mean()

    def block(rows: Tensor) -> Tensor:
        cross = moments.second(rows, drop)
        _check_finite(cross)
        return cross.addr_(mean[rows], mean[drop], alpha=-1) if center else cross

    if folded is None:
        right = block(keep)
    else:
        dropped = folded[:, drop].double()
        right = dropped.new_empty(keep.numel(), dropped.shape[0])
        for start, stop in spans(0, keep.numel()):
            torch.mm(block(keep[start:stop]), dropped.T, out=right[start:stop])
    right[dead] = 0.0
    return right


def folded_system(
    moments: Moments,
    weight: Tensor,
    keep: Tensor,
    drop: Tensor,
    ridge: float,
    center: bool,
    drift: Drift | None = None,
) -> tuple[System, Tensor]:
    """`C_SS`, and `C_SM W_Mᵀ` (s, out): all that a repair of W (out, n) needs of the Moments.

    With the drift z of the rows of W, `C_SM W_Mᵀ + Cov(x̂_S, z)`.

    Raises:
        ValueError: the weight has other rows or columns than the statistics; and what
            `kept_system` raises.
        InputError: NaN, infinite or empty statistics.
    """
    weight = weight.detach()
    if weight.ndim != 2 or weight.shape[1] != moments.columns:
        raise ValueError(
            f"weight must be (out, {moments.columns}), a column for each of the Moments; "
            f"got {tuple(weight.shape)}"
        )
    if drift is not None:
        check_drift(drift, moments, weight)
    system = kept_system(moments, keep, drop, ridge, center)
    right = cross_block(moments, keep, drop, center, system.dead, weight)
    if drift is not None:
        for start, stop in spans(0, keep.numel()):
            right[start:stop] += drift.with_columns(keep[start:stop], center).T
        right[system.dead] = 0.0
        if not bool(right.sum().isfinite() & drift.pairs.sum_x.sum().isfinite()):
            raise InputError("the drift holds NaN or infinite values; check the dense activations")
    return system, right


def folded_bytes(kept: int, dropped: int, rows: int) -> int:
    """Most bytes that `folded_system` holds for `rows` rows of W, its result included.

    Blocks of `Cov(x̂_S, z)` are no larger than those of C_SM and W_M, which are gone by then.
    """
    s, m, n = kept, dropped, kept + dropped
    crossed = 8 * (s * s + rows * (s + m)) + gather_bytes(min(s, BLOCK), m, n)
    return max(gather_bytes(s, s, n), crossed)


def _check_finite(*values: Tensor) -> None:
    # a sum is finite only if all of it is, and needs no mask of the size of the matrix
    if not all(bool(value.sum().isfinite()) for value in values):
        raise InputError("the Moments hold NaN or infinite values; check the activations")


def check_partition(moments: Moments, keep: Tensor, drop: Tensor) -> None:
    """Raises ValueError unless keep and drop are all columns, each once."""
    together = torch.cat([keep, drop]).sort().values
    expected = torch.arange(moments.columns, device=together.device)
    if together.shape != expected.shape or not bool(torch.equal(together, expected)):
        raise ValueError(
            f"keep ({keep.numel()}) and drop ({drop.numel()}) must be a partition of the "
            f"{moments.columns} columns"
        )

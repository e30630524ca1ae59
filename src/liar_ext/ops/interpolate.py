"""Interpolation: predict the dropped columns from the kept ones, `x_M ≈ Qᵀ x_S + P`.

LIAR (arXiv 2407.13331). With `C = G/N − μμᵀ`, `λ = ridge · mean(diag C)`:

    Q = (C_SS + λI)⁻¹ C_SM        P = μ_M − Qᵀ μ_S

and without intercept the uncentred system, `C → G/N`, with `P = 0`. Dropping P from the centred
fit would leave a bias of `W_M P`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.diagnostics import RECORD_BYTES, Diagnostics
from liar_ext.ops.drift import Drift
from liar_ext.ops.inverse import inverse_
from liar_ext.ops.moments import BLOCK, Moments, gather_bytes, spans
from liar_ext.ops.solve import Precision, check_not_negative, solve
from liar_ext.ops.system import check_partition, cross_block, folded_system, kept_system


@dataclass(frozen=True)
class Interpolation:
    """Attributes: `Q` (|S|, |M|) and `P` (|M|), float64; how they were solved."""

    Q: Tensor
    P: Tensor
    diagnostics: Diagnostics


@dataclass(frozen=True)
class Inverse:
    """Attributes: `theta` = `(C + λI)⁻¹` (n, n) float64, dead rows and columns those of the
    identity; `dead` (n,) bool, columns without variance, up to rounding; what it was made with:
    relative ridge, λ, center, and the tokens of the Moments."""

    theta: Tensor
    dead: Tensor
    ridge: float
    strength: float
    center: bool
    count: int


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
        precision: see `solve`.
    Raises:
        ValueError: keep and drop are not a partition, or the ridge is no number ≥ 0.
        InputError: NaN, infinite or empty Moments.
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
    system = kept_system(moments, keep, drop, ridge, center)
    right = cross_block(moments, keep, drop, center, system.dead)
    solved = system.solve(right, ridge, gram.dtype, cast(Precision, precision))
    solution, mean = solved.solution[0], moments.mean()
    p = mean[drop] - solution.T @ mean[keep] if center else torch.zeros_like(mean[drop])
    return solution, p, solved.diagnostics[0].encode()


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
    inverse: Inverse | None = None,
    outputs: int | None = None,
    drift: Drift | None = None,
) -> Repair:
    """Fold the Interpolation into a consumer weight (out, n): `W' = W_S + W_M Qᵀ`, `W_M P`.

    Of the equivalent systems the cheapest is solved (`cheapest`); `repair_bytes` says what it
    holds. Rows of W do not see each other, so slices of W can be repaired apart.

    With a drift, W' and b' aim at the dense path's output (`ops.drift`). What that asks for is no
    combination of the dropped columns, so that only `fold first` can be solved. `drop` may then be
    empty: what was kept whole has drifted, too.

    Args:
        weight: (out, n) of any floating dtype.
        outputs: rows of the whole W where `weight` is a slice of it, so that every slice is
            solved the same way; None for out.
        inverse: `inverse_moments` of the same Moments, if it is there already; it makes small
            removals cheap.
        drift: of the rows of `weight`, over the tokens of the Moments.
    Raises:
        ValueError: the weight has other columns than the Moments, or rows than the drift, or the
            inverse another ridge, center or number of tokens.
        and what `interpolate` raises.
    """
    weight = weight.detach()
    if weight.ndim != 2 or weight.shape[1] != moments.columns:
        raise ValueError(
            f"weight must be (out, {moments.columns}), a column for each of the Moments; "
            f"got {tuple(weight.shape)}"
        )
    if inverse is not None:
        made = (inverse.ridge, inverse.center, inverse.count, inverse.theta.shape[0])
        if made != (ridge, center, int(moments.count), moments.columns):
            raise ValueError(
                f"the inverse was made with ridge {inverse.ridge}, center {inverse.center} and "
                f"{inverse.count} tokens of {inverse.theta.shape[0]} columns, not with "
                f"ridge {ridge}, center {center}, {int(moments.count)} and {moments.columns}"
            )
    outputs = weight.shape[0] if outputs is None else outputs
    route = "fold first"
    if drift is None:
        route = cheapest(keep.numel(), drop.numel(), outputs, inverse is not None)
    carried = diagnostics = None
    steps: tuple[str, ...] = ()
    if inverse is not None and route.startswith("inverse"):
        check_partition(moments, keep, drop)
        try:
            carried, diagnostics = _carry_by_inverse(
                inverse, weight, keep, drop, outputs, moments.gram.dtype, precision
            )
        except NumericalError as error:
            # a ridge on the dropped block would be another definition
            steps = (f"inverse: {error}; solved from the Moments",)
            route = cheapest(keep.numel(), drop.numel(), outputs, False)
    if carried is None or diagnostics is None:
        folds = route == "fold first"
        if folds:
            system, right = folded_system(moments, weight, keep, drop, ridge, center, drift)
        else:
            system = kept_system(moments, keep, drop, ridge, center)
            right = cross_block(moments, keep, drop, center, system.dead)
        solved = system.solve(right, ridge, moments.gram.dtype, precision)
        # as large as all that follows
        del system, right
        z = solved.solution[0]
        carried = z.T.contiguous() if folds else weight[:, drop].double() @ z.T
        diagnostics = solved.diagnostics[0]
        diagnostics = dataclasses.replace(diagnostics, steps=steps + diagnostics.steps)
        del solved, z
    found = _fold(carried, moments, weight, keep, drop, center, diagnostics)
    if drift is not None and center:
        found.shift.add_(drift.mean())
    return found


def _fold(
    change: Tensor,
    moments: Moments,
    weight: Tensor,
    keep: Tensor,
    drop: Tensor,
    center: bool,
    diagnostics: Diagnostics,
) -> Repair:
    """`W_S + D` and `W_M μ_M − D μ_S` (zeros without `center`) of a change D (out, |S|).

    D is float64 and becomes the result.
    """
    mean = moments.mean()
    shift = change.new_zeros(weight.shape[0])
    if center:
        shift -= change @ mean[keep]
        for start, stop in spans(0, drop.numel()):
            part = drop[start:stop]
            shift += weight[:, part].double() @ mean[part]
    for start, stop in spans(0, keep.numel()):
        change[:, start:stop] += weight[:, keep[start:stop]]
    return Repair(change, shift, diagnostics)


def repair_bytes(
    kept: int,
    dropped: int,
    outputs: int,
    rows: int | None = None,
    route: str | None = None,
) -> int:
    """Most bytes that `repair` holds beside its arguments, its result included, on float64.

    Args:
        kept, dropped, outputs: s, m and rows of W; rows: of the slice that is repaired, None for
            all of them; route: a name of `costs`, None for the cheapest; `fold first` with a
            drift.
    Returns:
        the largest of four moments, with r right sides (rows, or m where Q is solved for):
        8 s² and a gather; 8 (s² + s r) with W_M and a block of C_SM; the solve,
        8 (2 s² + 2 s r + 512 (s + 1024)), with C_SS and its factor, right sides and solution, and
        the inverted blocks of the factor; and the result, with the solution and W_M. Libraries
        take up to 25 MB of their own at their first call. On a GPU `products_bytes` more.
    """
    s, m, n = kept, dropped, kept + dropped
    r = outputs if rows is None else rows
    matrix, block = 8 * s * s, min(s, BLOCK)
    built = gather_bytes(s, s, n)
    if (route or cheapest(kept, dropped, outputs)) == "fold first":
        right, result = 8 * s * r, 8 * s * r
        crossed = matrix + right + 8 * r * m + gather_bytes(block, m, n)
    else:
        right, result = 8 * s * m, 8 * s * r + 8 * r * m
        crossed = matrix + gather_bytes(s, m, n)
    solved = 2 * matrix + 2 * right + (8 * BLOCK * (s + 2 * BLOCK) if s > BLOCK else 0)
    return max(built, crossed, solved, right + result)


def products_bytes(kept: int, right: int) -> int:
    """What a solve holds on a GPU on top of that, where it substitutes by products.

    The right sides of a block of rows are made anew by each product; and with up to 512 rows there
    are the inverse of the factor, and what it is made from.
    """
    block = min(kept, BLOCK)
    return 8 * block * right + (0 if kept > BLOCK else 16 * block * block)


def costs(kept: int, dropped: int, outputs: int, inverse: bool) -> dict[str, float]:
    """Floating-point operations of each way to `W_M Qᵀ`, cheapest need not be first.

    Args:
        kept, dropped, outputs: s, m and rows of W. inverse: `(C+λI)⁻¹` is there already.
    Returns:
        by name: `direct` solves for Q, `fold first` for `C_SM W_Mᵀ` (out columns instead of m);
        with Θ = (C+λI)⁻¹, `Qᵀ = −Θ_MM⁻¹ Θ_MS` needs a system of m columns only: `inverse` solves
        it for Θ_MS, `inverse, fold first` for W_Mᵀ.
    """
    s, m, out = float(kept), float(dropped), float(outputs)
    ways = {
        "direct": s**3 / 3 + 2 * s * s * m + 2 * out * m * s,
        "fold first": s**3 / 3 + 2 * s * m * out + 2 * s * s * out,
    }
    if inverse:
        ways["inverse"] = m**3 / 3 + 2 * m * m * s + 2 * out * m * s
        ways["inverse, fold first"] = m**3 / 3 + 2 * m * m * out + 2 * out * m * s
    return ways


def cheapest(kept: int, dropped: int, outputs: int, inverse: bool = False) -> str:
    """The name of the least of `costs`; the earlier one where they are equal."""
    ways = costs(kept, dropped, outputs, inverse)
    return min(ways, key=ways.__getitem__)


def inverse_moments(moments: Moments, *, ridge: float, center: bool = True) -> Inverse:
    """`Θ = (C + λI)⁻¹` of all columns.

    Worth its n³ operations, and an n × n float64 matrix, where several Selections of one Site are
    tried: each then costs a system of its dropped columns only.

    Args:
        moments: the whole triangle; ridge, center: as in `interpolate`.
    Raises:
        ValueError: the triangle is incomplete, or the ridge no number ≥ 0.
        InputError: NaN, infinite or empty Moments.
        NumericalError: `C + λI` has no usable inverse: a larger ridge is the caller's decision,
            since Θ of another ridge is another Θ.
    """
    check_not_negative("ridge", ridge)
    if not moments.complete:
        raise ValueError("the inverse needs all columns: accumulate without keep")
    every = torch.arange(moments.columns, device=moments.sum.device)
    system = kept_system(moments, every, every[:0], ridge, center)
    strength = ridge * system.mean_diagonal
    dead = system.kept.diagonal() == 0
    try:
        theta = inverse_(system.kept, strength, system.floor)
    except NumericalError as error:
        raise NumericalError(f"the Moments with ridge {ridge:.1e}: {error}; raise it") from error
    # dead columns: one on the diagonal, as in the system that was inverted
    theta.diagonal().add_(dead.double())
    return Inverse(theta, dead, ridge, strength, center, int(moments.count))


def _carry_by_inverse(
    inverse: Inverse,
    weight: Tensor,
    keep: Tensor,
    drop: Tensor,
    outputs: int,
    moments_dtype: torch.dtype,
    precision: Precision,
) -> tuple[Tensor, Diagnostics]:
    """`W_M Qᵀ = −W_M Θ_MM⁻¹ Θ_MS`, whichever product comes first.

    Raises:
        NumericalError: `Θ_MM` cannot be solved without a ridge of its own.
    """
    block, side = inverse.theta[drop][:, drop], inverse.theta[drop][:, keep]
    dropped_weight = weight[:, drop].double()
    fold_first = outputs < keep.numel()
    right = dropped_weight.T if fold_first else side
    solved = solve(block[None], right[None], 0.0, moments_dtype=moments_dtype, precision=precision)
    found = solved.diagnostics[0]
    if found.ridge_used != 0.0:
        raise NumericalError(found.steps[-1])
    z = solved.solution[0]
    carried = -(z.T @ side) if fold_first else -(dropped_weight @ z)
    # the ridge is inside Θ
    return carried, dataclasses.replace(
        found, ridge=inverse.ridge, ridge_used=inverse.ridge, strength=inverse.strength
    )

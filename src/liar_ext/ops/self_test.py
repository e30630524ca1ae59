"""The self-tests of `backends`: a few small cases for each op, against its float64 definition.

Each returns a relative error and its bound; NaN never passes. The cases are chosen so that a kernel
cannot be wrong in one of its usual ways and pass: it is called twice into tensors that hold
something, over more tokens than one flush, at widths with and without an edge, on rows that are
aligned and rows that are not, and no two systems of a batch are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS = 640
# times the bound that sums of one sign may err by
LONG = 2.0
# with and without an edge in tiles and 16-byte groups
WIDTHS = (208, 75)


def gram_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Triangles and panels of Selections, with and without a token mask."""
    from liar_ext.ops.gram import gram_reference
    from liar_ext.ops.moments import Moments

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    worst = 0.0
    for columns, cases in zip(WIDTHS, (("whole", "scattered"), ("masked", "first")), strict=True):
        x, mask = _activations(columns, device, dtype)
        first = torch.arange(2 * columns // 3, device=device)
        keeps = {"scattered": columns - 1 - first, "first": first}
        for case in cases:
            valid, keep = mask if case in ("masked", "scattered") else None, keeps.get(case)
            found = Moments.zeros(columns, dtype=wide, device=device, keep=keep)
            true = gram_reference(x, valid, keep)
            for _ in range(2):
                run(x, valid, found.order, found.gram, found.sum, found.count)
            worst = _worst(worst, found.gram.tril(), 2 * true.gram.tril())
            worst = _worst(worst, found.sum, 2 * true.sum)
            worst = _worst(worst, found.count.double(), 2 * true.count.double())
    x = _long_sums(device, dtype)
    found, true = Moments.zeros(x.shape[1], dtype=wide, device=device), gram_reference(x)
    run(x, None, found.order, found.gram, found.sum, found.count)
    worst = max(worst, _worst(0.0, found.gram.tril(), true.gram.tril()) / LONG)
    if dtype == torch.float32:
        x = _planes(device)
        found, true = Moments.zeros(x.shape[1], device=device), gram_reference(x)
        run(x, None, found.order, found.gram, found.sum, found.count)
        worst = max(worst, _missing_plane(found.gram.tril(), true.gram.tril()))
    return worst, _rounding(wide)


def cross_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Products of two different widths with and without a token mask."""
    from liar_ext.ops.cross import CrossMoments, cross_reference

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (x, mask), (y, _) = (_activations(columns, device, dtype) for columns in WIDTHS)
    worst = 0.0
    for left, right, valid in ((x, y, None), (y, x, mask)):
        found = CrossMoments.zeros(left.shape[1], right.shape[1], dtype=wide, device=device)
        true = cross_reference(left, right, valid)
        for _ in range(2):
            run(left, right, valid, found.cross, found.sum_x, found.sum_y)
        worst = _worst(worst, found.cross, 2 * true.cross)
        worst = _worst(worst, found.sum_x, 2 * true.sum_x)
        worst = _worst(worst, found.sum_y, 2 * true.sum_y)
    if dtype == torch.float32:
        x = _planes(device)
        found = CrossMoments.zeros(x.shape[1], x.shape[1], device=device)
        run(x, x, None, found.cross, found.sum_x, found.sum_y)
        worst = max(worst, _missing_plane(found.cross, cross_reference(x, x).cross))
    return worst, _rounding(wide)


def pack_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Reversed and strided columns with a token mask: moved, so without any error."""
    from liar_ext.ops.pack import pack_reference

    worst = 0.0
    for columns in WIDTHS:
        x, mask = _activations(columns, device, dtype)
        order = torch.arange(columns, device=device).flip(0)
        worst = _worst(worst, run(x, mask, order), pack_reference(x, mask, order))
        worst = _worst(worst, run(x[:, ::2], None, None), pack_reference(x[:, ::2]))
    return worst, 0.0


def cosine_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Rows of every size and direction, zeros and what is not finite; some of them, and any stride.

    The error is absolute: that of a cosine is, whatever it is itself.
    """
    from liar_ext.ops.cosine import error_bound, row_cosines_reference

    worst = 0.0
    # the last one: more than one step of a kernel's loop
    for columns in (*WIDTHS, 600):
        x, y, some = _directions(columns, device, dtype)
        for left, right, valid in ((x, y, None), (y, x, some), (x[::3, ::2], y[::3, ::2], None)):
            found = run(left, right, valid).double()
            true = row_cosines_reference(left, right, valid)
            hidden = not torch.equal(found.isnan(), true.isnan())
            error = (found - true).nan_to_num(0.0, torch.inf, torch.inf).abs().max()
            worst = float("inf") if hidden else max(worst, float(error))
    return worst, 1e-13 if dtype == torch.float64 else error_bound(600)


def solve_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Batches of one block and of several panels: three systems, one with dead columns, one broken.

    A wrong diagnosis counts as an infinite error.
    """
    from liar_ext.ops.attempt import Attempt, attempt_reference

    worst = 0.0
    for size in (75, 96, 208):
        matrix, right = (torch.stack(parts) for parts in zip(*_systems(size, device), strict=True))
        strength = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64, device=device)
        mean, dropped = matrix[:, 1].contiguous(), right[:, 2].contiguous()
        found = Attempt(*run(matrix, right, strength, mean, dropped, dtype))
        true = attempt_reference(matrix, right, strength, mean, dropped)
        for good in (0, 1):
            worst = _worst(worst, found.solution[good], true.solution[good])
            worst = _worst(worst, found.shift[good], true.shift[good])
        estimates = torch.stack([found.largest / true.largest, found.smallest / true.smallest])
        diagnosed = (
            torch.equal(found.info[:2], torch.zeros_like(found.info[:2]))
            and int(found.info[2]) == int(true.info[2])
            and bool((estimates[:, :2].log().abs() <= 1.1).all())
            and bool((found.error[:2] <= 1e-12).all())
            and bool(((found.pivot - true.pivot)[:2].abs() <= 1e-4).all())
        )
        worst = worst if diagnosed else float("inf")
    return worst, 1e-12 if dtype == torch.float64 else 1e-8


def _systems(size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    x, _ = _activations(3 * size, device, torch.float64)
    systems = []
    for part in x.split(size, dim=1):
        centred = part - part.mean(0)
        matrix = centred.T @ centred / TOKENS
        systems.append((matrix, matrix[:, :40] + part[:size, :40]))
    systems[1][0][[3, size - 1]] = 0.0
    systems[1][0][:, [3, size - 1]] = 0.0
    # not positive definite from the second of these on
    middle = size // 2
    systems[2][0][middle, middle - 1] = systems[2][0][middle - 1, middle] = 10.0
    return systems


def _activations(columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Correlated columns with means, and a mask; no generator's state is touched."""
    from liar_ext.ops.factor import probes

    row = torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None]
    x = (probes(TOKENS, columns, row)[0] + 0.2 + 0.2 * (row * 0.7).sin()).to(
        device=device, dtype=dtype
    )
    return x, (torch.arange(TOKENS) % 3 != 1).to(device)


def _directions(
    columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of rows with cosines from -1 to 1, and indices of some of them."""
    made, mask = _activations(columns, torch.device("cpu"), torch.float64)
    x, other = made[::10], made.flip(0)[::10]
    y = x * torch.linspace(-1.0, 1.0, len(x), dtype=torch.float64)[:, None] + 0.3 * other
    y[8], y[9] = x[8], -x[9]
    # squares of these are infinite or zero in the sums' dtype
    limits = torch.finfo(dtype)
    for rows in (x[1], y[2], x[14], y[14], x[15]):
        rows *= limits.max / 4 / rows.abs().max()
    for rows in (x[3], y[6], x[16], y[16], y[15]):
        rows.copy_(rows.sign() * (1.0 + rows.abs() / rows.abs().max()) * limits.smallest_normal)
    x[4], y[5], x[7], y[7] = 0.0, 0.0, 0.0, 0.0
    # in the last column, and beside a row of zeros as well
    y[4, -1], x[10, -1], y[11, -1], x[12, 0], y[13, 1] = torch.tensor(
        [torch.inf, torch.nan, torch.nan, torch.inf, -torch.inf], dtype=torch.float64
    )
    some = mask[: len(x)].nonzero().flatten().flip(0)
    x, y = (value.to(device=device, dtype=dtype) for value in (x, y))
    return x, y, some.to(device)


def _long_sums(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sums of one sign over several flushes of every kernel: what is never moved out of a tensor
    core has lost 7e-6 (an H100, bfloat16) and more of them by truncation, by the model of
    `kernels/tune.py`; what is, 6e-7 to 1.1e-6."""
    from liar_ext.ops.factor import probes

    return (probes(4 * TOKENS, 48, torch.zeros(1, dtype=torch.float64, device=device))[0] + 0.5).to(
        dtype
    )


def _planes(device: torch.device) -> Tensor:
    """Columns whose products are worth what the smaller parts of a split float32 give.

    A float32 goes into a tensor core as three bfloat16, `h + m + l`. The products h h cancel here
    token by token, so that what is left of a sum is l h or h l, 2⁻²⁰ a token, m h or h m, 2⁻¹⁰, or
    m m, 2⁻²⁰.
    """
    token = torch.arange(TOKENS)
    signs, others = 1.0 - 2.0 * (token % 2), 1.0 - 2.0 * (token // 2 % 2)
    one = torch.ones(TOKENS)
    three_parts = signs + others * 2.0**-10 + 2.0**-20
    columns = [one, three_parts, signs + 2.0**-10, others + 2.0**-10, one]
    return torch.stack(columns, dim=1).to(device)


def _missing_plane(found: Tensor, true: Tensor) -> float:
    """Infinite where a product of `_planes` is left out, which is all of such an entry, else 0.

    Tensor cores truncate at the size of what cancels: up to 1 % of these entries.
    """
    small = (true.abs() > 0) & (true.abs() < 1.0)
    error = ((found.double() - true.double()) / true.double())[small]
    return 0.0 if bool((error.abs() < 0.2).all()) else float("inf")


def _rounding(dtype: torch.dtype) -> float:
    # a sum of 1280 products errs by 0.5 to 1.4e-7 in float32, and by 3 to 4.3e-7 where tensor cores
    # truncate their running sums, by the model of kernels/tune.py; an H200 is within it
    return 1e-6 if dtype == torch.float32 else 1e-13


def _worst(before: float, found: Tensor, true: Tensor) -> float:
    error = (found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300)
    value = float(error)
    return max(before, value) if value == value else float("inf")

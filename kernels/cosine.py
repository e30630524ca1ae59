"""Cosines of rows with Triton: three sums of a row, `x·y`, `x·x` and `y·y`, in one pass over both.

    out[i] = x·y / (√x·x √y·y)  of rows t = valid[i] of x and y,  0 where a row is zero

A program has a few rows, one for each of its warps where rows are aligned: the sums of a row stay
in registers until they are done, nothing is shared between programs, and the bits are the same
every time. The pass is limited by memory: while one pair of 16-bit values arrives, an H200 can
issue some 25 instructions by its data sheet, and the loop takes 6.

Squares leave the range of float32 long before values do: they are infinite from 1e19 on, and lose
bits below 1e-19. So a row whose sums of squares are outside of [2^-80, 2^120] is read again, from
the caches, times a power of two, which changes no bit of a cosine. All others are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liar_ext.kernels.runtime import on_device

# rows of a program, one for each of its warps
ROWS = 4
# bytes of a row that a warp reads at a time, 16 for each of its 32 threads: the widest load. Of x
# and y together it has 1 KiB on its way, so that the 40 warps that fit on a multiprocessor of an
# H200 have 40 KiB, where 25 are due (4.8 TB/s for 0.7 µs, over 132). Two pieces at a time
# would need 56 registers instead of 48, and the compiler orders one load behind the first sums
PIECE = 512
# elements from the first one of a row that 32 bits count
MOST_OFFSET = 2**31 - 1

# sums of squares that need no factor. From the lower one on, what squares and products below the
# smallest normal number, 2^-126, can lose is less than a rounding of their sum, up to 2^22 columns;
# up to the upper one x·y, which is no larger than the larger of them, is finite as well
LEAST = tl.constexpr(2.0**-80)
MOST = tl.constexpr(2.0**120)
# factors of the rows outside. Below, the smallest float32, 2^-149, then has a square of 2^-98, and
# the sum is below 2^120; above, the largest value has one of 2^96, and the sum is at least 2^-40
UP = tl.constexpr(2.0**100)
DOWN = tl.constexpr(2.0**-80)


@triton.jit
def _sums(
    x_row,
    y_row,
    x_factor,
    y_factor,
    real,
    columns,
    x_column_stride,
    y_column_stride,
    SCALED: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`x·x`, `y·y` and `x·y` (ROWS,) of rows at `x_row` and `y_row`, each times its factor."""
    xx = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    yy = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    xy = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        wanted = real[:, None] & (column < columns)
        if FAR:
            column = column.to(tl.int64)
        left = tl.load(x_row[:, None] + column * x_column_stride, mask=wanted, other=0.0)
        right = tl.load(y_row[:, None] + column * y_column_stride, mask=wanted, other=0.0)
        left, right = left.to(tl.float32), right.to(tl.float32)
        if SCALED:
            left, right = left * x_factor[:, None], right * y_factor[:, None]
        xx += left * left
        yy += right * right
        xy += left * right
    return tl.sum(xx, axis=1), tl.sum(yy, axis=1), tl.sum(xy, axis=1)


@triton.jit
def _factor(squares):
    return tl.where(squares > MOST, DOWN, tl.where(squares < LEAST, UP, 1.0))


@triton.jit(do_not_specialize=["tokens", "count"])
def cosine_kernel(
    x_ptr,
    y_ptr,
    valid_ptr,
    out_ptr,
    tokens,
    count,
    columns,
    x_stride,
    y_stride,
    x_column_stride,
    y_column_stride,
    HAS_VALID: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < count
    row = place.to(tl.int64)
    real = inside
    if HAS_VALID:
        row = tl.load(valid_ptr + place, mask=inside, other=0)
        # to look at the indices beforehand would wait for the device: what is no row is not read
        real = inside & (row >= 0) & (row < tokens)
    x_row, y_row = x_ptr + row * x_stride, y_ptr + row * y_stride
    one = tl.full((ROWS,), 1.0, dtype=tl.float32)
    xx, yy, xy = _sums(
        *(x_row, y_row, one, one, real, columns, x_column_stride, y_column_stride),
        SCALED=False,
        FAR=FAR,
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
    # NaN is neither, and stays
    x_factor, y_factor = _factor(xx), _factor(yy)
    again = real & ((x_factor != 1.0) | (y_factor != 1.0))
    if tl.max(again.to(tl.int32), axis=0) > 0:
        xx, yy, xy = _sums(
            *(x_row, y_row, x_factor, y_factor, real, columns, x_column_stride, y_column_stride),
            SCALED=True,
            FAR=FAR,
            ROWS=ROWS,
            BLOCK=BLOCK,
        )
    norms = tl.sqrt_rn(xx) * tl.sqrt_rn(yy)
    # 0 · ∞ and 0 · NaN are NaN: norms are 0 where one row is zero and the other finite, as is x·y
    cosine = tl.div_rn(xy, tl.where(norms == 0.0, 1.0, norms))
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    tl.store(out_ptr + place, tl.where(real, cosine, float("nan")), mask=inside)


def row_cosines(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosines of the rows of `x` with those of `y`.

    Args:
        x, y: (T, d) float32, float16 or bfloat16, any strides. They are read in 16-byte pieces
            where rows start at multiples of 16 elements.
        valid: (V,) int64 rows to take, in any order, or None for all.
    Returns:
        (V,) or (T,) float32 in [-1, 1]; 0 where a row is zero, NaN where one is not finite or an
        index is no row.
    """
    count = x.shape[0] if valid is None else valid.numel()
    out = torch.empty(count, dtype=torch.float32, device=x.device)
    if count == 0:
        return out
    # a column of a transposed tensor may lie further away than 32 bits count; where none does, 64
    # would take registers from the loop
    far = x.shape[1] * max(x.stride(1), y.stride(1)) > MOST_OFFSET
    with on_device(x.device):
        cosine_kernel[(triton.cdiv(count, ROWS),)](
            x,
            y,
            # what is absent still needs a pointer; the kernel never uses it
            x if valid is None else valid.contiguous(),
            out,
            x.shape[0],
            count,
            x.shape[1],
            x.stride(0),
            y.stride(0),
            x.stride(1),
            y.stride(1),
            HAS_VALID=valid is not None,
            FAR=far,
            ROWS=ROWS,
            BLOCK=PIECE // max(x.element_size(), y.element_size()),
            num_warps=ROWS,
        )
    return out

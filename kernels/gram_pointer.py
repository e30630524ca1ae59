"""The product kernel with asynchronous copies through pointers, for compute capability 8.0 and up.

It takes any mask of tokens: the mask is part of the load, so masked rows are never read and the
copies stay asynchronous (a select on a loaded operand would move it through registers).

One program for each tile, not a persistent grid as in `gram_descriptor`: addresses kept across
tiles cost 20 to 50 registers here, all that compute capability 8.0 has left.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from liar_ext.kernels.config import ProductConfig
from liar_ext.kernels.runtime import INTERPRET
from liar_ext.kernels.tiles import add_to_tile, multiply, tile_count, tile_of

# kernels of this module need this compute capability
CAPABILITY = 80


@triton.jit
def _load(ptr, first, token, valid, column, width, stride):
    # 64-bit for the first token, as 262144 tokens of 28672 columns pass 2^31 elements, and 32-bit
    # from there: half the registers for addresses
    at = ptr + first.to(tl.int64) * stride + token * stride + column
    return tl.load(at, mask=valid & (column < width), other=0.0)


@triton.jit(do_not_specialize=["tokens", "triangle"])
def pointer_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    out_ptr,
    tokens,
    x_width,
    y_width,
    rows,
    columns,
    x_plane,
    y_plane,
    x_stride,
    y_stride,
    out_stride,
    triangle,
    HAS_MASK: tl.constexpr,
    PLANES: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLUSH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK), tl.cdiv(columns, BLOCK), triangle, GROUP
    )
    i = row_tile * BLOCK + tl.arange(0, BLOCK)
    j = column_tile * BLOCK + tl.arange(0, BLOCK)
    steps = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(tl.cdiv(tokens, BLOCK_T)):
        first = step * BLOCK_T
        token = first + steps
        valid = token < tokens
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
        # x is loaded as its own transpose: on compute capability 8.0 a transpose of what was loaded
        # takes it off the asynchronous copies
        xt, xc, xv = steps[None, :], i[:, None], valid[None, :]
        yt, yc, yv = steps[:, None], j[None, :], valid[:, None]
        xh = _load(x_ptr, first, xt, xv, xc, x_width, x_stride)
        yh = _load(y_ptr, first, yt, yv, yc, y_width, y_stride)
        if PLANES == 3:
            xm = _load(x_ptr + x_plane, first, xt, xv, xc, x_width, x_stride)
            ym = _load(y_ptr + y_plane, first, yt, yv, yc, y_width, y_stride)
            xl = _load(x_ptr + x_plane + x_plane, first, xt, xv, xc, x_width, x_stride)
            yl = _load(y_ptr + y_plane + y_plane, first, yt, yv, yc, y_width, y_stride)
        else:
            xm, xl, ym, yl = xh, xh, yh, yh
        if FLUSH == 1:
            total += multiply(xh, xm, xl, yh, ym, yl, part, PLANES, UPCAST, True)
        else:
            part = multiply(xh, xm, xl, yh, ym, yl, part, PLANES, UPCAST, False)
            if (step + 1) % FLUSH == 0:
                total += part
                part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if FLUSH > 1:
        total += part
    on_diagonal = (triangle != 0) & (row_tile == column_tile)
    add_to_tile(out_ptr, total, i, column_tile * BLOCK, rows, columns, out_stride, on_diagonal)


def launch(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    out: Tensor,
    triangle: bool,
    config: ProductConfig,
) -> None:
    """`out += Σ x yᵀ` over the valid tokens.

    Args:
        x, y: (planes, T, width) float16 or bfloat16, unit column stride; the widths may be padded
            with zero columns beyond those of `out`.
        mask: (T,) uint8 or None.
        out: (rows, columns) float32, unit column stride.
        triangle: only entries on and below the diagonal.
    """
    rows, columns = out.shape
    tiles = tile_count(
        triton.cdiv(rows, config.block), triton.cdiv(columns, config.block), triangle
    )
    pointer_kernel[(tiles,)](
        x,
        y,
        # an absent mask still needs a pointer; the kernel never reads it
        x if mask is None else mask,
        out,
        x.shape[1],
        x.shape[2],
        y.shape[2],
        rows,
        columns,
        # no integers of another width, and so no second compilation, for one plane
        x.stride(0) if x.shape[0] > 1 else 0,
        y.stride(0) if y.shape[0] > 1 else 0,
        x.stride(1),
        y.stride(1),
        out.stride(0),
        int(triangle),
        HAS_MASK=mask is not None,
        PLANES=x.shape[0],
        UPCAST=INTERPRET,
        BLOCK=config.block,
        BLOCK_T=config.block_t,
        FLUSH=config.flush,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )

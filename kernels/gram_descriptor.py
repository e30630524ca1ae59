"""The product kernel with tensor-map copies (TMA), for compute capability 9.0 and up.

Operands come through host-side tensor descriptors: out-of-range rows and columns read as zero, so
there is no mask in the loop, and no mask of tokens either: the caller packs masked rows to zero.

How the sum of the tensor cores gets into a second one, as compiled for compute capability 9.0 with
tiles of 128², 8 warps, steps of 64 tokens and 5 stages (Triton 3.9 and 3.6; nothing of it timed):

    form                                            registers   a step waits for
    no second sum                                   120, 127    the product before the last
    nested loops, a sum for each 8 steps            152, 150    the same; but the pipeline of copies
                                                                runs empty at the end of each
    every product on its own, then added            153, 152    its own product
    one loop, added and cleared each 8th step       162, 164    the product before the last

The last form is FLUSH > 1 and the third FLUSH = 1. Written as `total += tl.dot(x, y)` the third is
compiled to the first: see `tiles.multiply`. A tile of 128 by 256 as two halves spills, since the
compiler keeps both products besides both sums (4 × 64 registers).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from liar_ext.kernels.config import ProductConfig
from liar_ext.kernels.runtime import INTERPRET, programs
from liar_ext.kernels.tiles import add_to_tile, multiply, tile_count, tile_of

# kernels of this module need this compute capability; older ones emulate descriptors with ordinary
# loads, without any pipelining
CAPABILITY = 90

# bytes: of the base address and of the row stride of what a tensor map describes
ALIGNMENT = 16


@triton.jit(do_not_specialize=["tokens", "triangle"])
def descriptor_kernel(
    xh_desc,
    xm_desc,
    xl_desc,
    yh_desc,
    ym_desc,
    yl_desc,
    out_ptr,
    tokens,
    rows,
    columns,
    out_stride,
    triangle,
    PLANES: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLUSH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK)
    column_tiles = tl.cdiv(columns, BLOCK)
    above = triangle * column_tiles
    tiles = above * (above + 1) // 2 + (row_tiles - above) * column_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_of(tile, row_tiles, column_tiles, triangle, GROUP)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for step in range(tl.cdiv(tokens, BLOCK_T)):
            xh = tl.trans(xh_desc.load([step * BLOCK_T, row_tile * BLOCK]))
            yh = yh_desc.load([step * BLOCK_T, column_tile * BLOCK])
            if PLANES == 3:
                xm = tl.trans(xm_desc.load([step * BLOCK_T, row_tile * BLOCK]))
                ym = ym_desc.load([step * BLOCK_T, column_tile * BLOCK])
                xl = tl.trans(xl_desc.load([step * BLOCK_T, row_tile * BLOCK]))
                yl = yl_desc.load([step * BLOCK_T, column_tile * BLOCK])
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
        i = row_tile * BLOCK + tl.arange(0, BLOCK)
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
    """`out += Σ x yᵀ` over all tokens; arguments as in `gram_pointer.launch`.

    Raises:
        ValueError: there is a mask, or x or y has a base address or a row stride that is not a
            multiple of 16 bytes.
    """
    if mask is not None:
        raise ValueError("the descriptor kernel takes no mask: pack masked rows to zero")
    for operand in (x, y):
        if operand.data_ptr() % ALIGNMENT or operand.stride(1) * x.itemsize % ALIGNMENT:
            raise ValueError(
                f"the descriptor kernel needs addresses and row strides of {ALIGNMENT} bytes; got "
                f"offset {operand.data_ptr() % ALIGNMENT}, stride {operand.stride(1)} of {x.dtype}"
            )
    rows, columns = out.shape
    tiles = tile_count(
        triton.cdiv(rows, config.block), triton.cdiv(columns, config.block), triangle
    )
    of_x = _descriptors(x, config)
    descriptor_kernel[(min(tiles, programs(x.device)),)](
        *of_x,
        *(of_x if y is x else _descriptors(y, config)),
        out,
        x.shape[1],
        rows,
        columns,
        out.stride(0),
        int(triangle),
        PLANES=x.shape[0],
        UPCAST=INTERPRET,
        BLOCK=config.block,
        BLOCK_T=config.block_t,
        FLUSH=config.flush,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _descriptors(x: Tensor, config: ProductConfig) -> list[Any]:
    """One descriptor for each plane; None for planes that are not there."""
    block = [config.block_t, config.block]
    # a tensor of one row may have any stride, and one of no padding is described as it is
    planes: list[Any] = [
        TensorDescriptor(plane, list(plane.shape), list(plane.stride()), block) for plane in x
    ]
    return planes + [None] * (3 - len(planes))

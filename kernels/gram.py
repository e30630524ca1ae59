"""Gram accumulation on a GPU: `G += X_oᵀ X_o[:, :s]` on and below the diagonal, `s += Σ x`.

One program owns one square tile of `G`, so results are deterministic and no atomics are needed. The
tile list is the whole saving: the triangle of `G_SS`, then the full rectangle `G_MS`; the dropped
block and the upper triangle have no tiles.

    column tiles ->  0 1 2        tiles 0..5 are the triangle, in the order 00 10 11 20 21 22;
    row tiles 0      x            from 6 on the rectangle, row by row: 30 31 32 40 41 42
              1      x x
              2      x x x
              3      x x x   <-  dropped columns as rows
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# read when triton decorates the kernels below; changing the variable later has no effect on them
INTERPRET = triton.knobs.runtime.interpret

# tokens per launch: a tensor core truncates its running sum, a one-sided error that grows with the
# length of one accumulation; the float32 addition into G in between rounds to nearest
TOKENS = 16384

# tokens and columns of one program that adds up columns
SUM_TOKENS = 512
SUM_STEP = 16
SUM_COLUMNS = 128


@dataclass(frozen=True)
class GramConfig:
    """Launch parameters: tiles of `block`² of G, `block_t` tokens per step."""

    block: int
    block_t: int
    warps: int
    stages: int


# by compute capability and dtype. tests/kernels compiles each for its architecture and fails on a
# register spill, on more shared memory than a block has, and on lost asynchronous copies (they need
# panels of a multiple of 16 columns); none was timed on a GPU yet
CONFIGS: dict[int, dict[torch.dtype, GramConfig]] = {
    80: {
        torch.bfloat16: GramConfig(block=128, block_t=64, warps=8, stages=3),
        torch.float16: GramConfig(block=128, block_t=64, warps=8, stages=3),
        torch.float32: GramConfig(block=128, block_t=16, warps=8, stages=3),
    },
    90: {
        torch.bfloat16: GramConfig(block=128, block_t=64, warps=8, stages=3),
        torch.float16: GramConfig(block=128, block_t=64, warps=8, stages=3),
        torch.float32: GramConfig(block=128, block_t=16, warps=8, stages=3),
    },
}

# the interpreter's time is per step, not per element
INTERPRETED = GramConfig(block=64, block_t=64, warps=4, stages=1)


def config_for(dtype: torch.dtype, capability: int) -> GramConfig:
    """The config of the newest architecture not newer than `capability` (90 for 9.0).

    Raises:
        ValueError: the GPU is older than every config, or the dtype has none.
    """
    usable = [arch for arch in CONFIGS if arch <= capability]
    if not usable:
        raise ValueError(
            f"no Gram kernel for compute capability {capability / 10:.1f}: "
            f"it needs {min(CONFIGS) / 10:.1f} or newer; set LIAR_BACKEND=torch"
        )
    configs = CONFIGS[max(usable)]
    if dtype not in configs:
        raise ValueError(f"no Gram kernel for {dtype}: use one of {', '.join(map(str, configs))}")
    return configs[dtype]


@triton.jit
def _tile_of(tile, panel_tiles):
    """Row and column tile of a linear index: the triangle first, then the rectangle."""
    triangle = panel_tiles * (panel_tiles + 1) // 2
    # float32 square roots are off by one for large indices: one correction each way
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    rest = tile - triangle
    inside = tile < triangle
    return (
        tl.where(inside, row, panel_tiles + rest // panel_tiles),
        tl.where(inside, column, rest % panel_tiles),
    )


@triton.jit
def gram_kernel(
    x_ptr,
    mask_ptr,
    gram_ptr,
    tokens,
    columns,
    panel,
    x_stride,
    gram_stride,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row_tile, column_tile = _tile_of(tl.program_id(0), tl.cdiv(panel, BLOCK))
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    cols = column_tile * BLOCK + tl.arange(0, BLOCK)

    steps = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        token = start + steps
        valid = token < tokens
        if HAS_MASK:
            # in the load mask: a select afterwards would pull the operand into registers
            valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
        # 64-bit: 262144 tokens of 28672 columns pass 2^31 elements
        row_of_x = x_ptr + token.to(tl.int64)[:, None] * x_stride
        left = tl.load(
            row_of_x + rows[None, :],
            mask=valid[:, None] & (rows < columns)[None, :],
            other=0.0,
        )
        right = tl.load(
            row_of_x + cols[None, :],
            mask=valid[:, None] & (cols < panel)[None, :],
            other=0.0,
        )
        if UPCAST:
            # the interpreter multiplies the bit patterns of bfloat16
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        # "ieee": float32 products would be TF32 by default
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")

    at = gram_ptr + rows.to(tl.int64)[:, None] * gram_stride + cols[None, :]
    inside = (rows < columns)[:, None] & (cols < panel)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def sum_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    tokens,
    columns,
    x_stride,
    HAS_MASK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[part, column] = Σ over SPAN tokens, float64: reading x is what takes the time."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float64)
    for start in range(0, SPAN, BLOCK_T):
        token = part * SPAN + start + tl.arange(0, BLOCK_T)
        valid = token < tokens
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
        value = tl.load(
            x_ptr + token.to(tl.int64)[:, None] * x_stride + cols[None, :],
            mask=valid[:, None] & (cols < columns)[None, :],
            other=0.0,
        )
        # bfloat16 to float64 in one step is not there on every architecture
        total += value.to(tl.float32).to(tl.float64)
    out = out_ptr + part.to(tl.int64) * columns + cols
    tl.store(out, tl.sum(total, axis=0), mask=cols < columns)


def accumulate(
    x: Tensor, token_mask: Tensor | None, order: Tensor | None, gram: Tensor, sum: Tensor
) -> None:
    """Accumulate into `gram` and `sum` in place; `liar_ext.ops.gram` checks the arguments.

    Args:
        x: (T, n) float32, float16 or bfloat16 on a GPU (or on the CPU under TRITON_INTERPRET=1).
        token_mask: (T,) bool or None.
        order: (n,) int64 column order of `gram`, or None.
        gram: (n, s) float32, unit column stride. sum: (n,) float64, natural order.
    Raises:
        ValueError: the GPU is too old, or the dtype has no kernel.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    if x.is_cuda and not INTERPRET:
        major, minor = torch.cuda.get_device_capability(x.device)
        config = config_for(x.dtype, 10 * major + minor)
    else:
        config = INTERPRETED
    mask = None if token_mask is None else token_mask.contiguous().view(torch.uint8)
    # triton launches on the current device, which need not be that of x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for start in range(0, x.shape[0], TOKENS):
            part = x[start : start + TOKENS]
            valid = None if mask is None else mask[start : start + TOKENS]
            _add_sums(part, valid, sum)
            # packed here: a gather inside the kernel takes 2-byte operands off the asynchronous
            # copies (12 to 24 of them become 0), and packing reads x once, the kernel many times
            ordered = part if order is None else part[:, order]
            _add_gram(ordered, valid, gram, config)


def _add_sums(x: Tensor, mask: Tensor | None, sum: Tensor) -> None:
    tokens, columns = x.shape
    parts = triton.cdiv(tokens, SUM_TOKENS)
    partial = torch.empty(parts, columns, dtype=torch.float64, device=x.device)
    sum_kernel[(triton.cdiv(columns, SUM_COLUMNS), parts)](
        x,
        # an absent mask still needs a pointer; the kernel never reads it
        x if mask is None else mask,
        partial,
        tokens,
        columns,
        x.stride(0),
        HAS_MASK=mask is not None,
        SPAN=SUM_TOKENS,
        BLOCK=SUM_COLUMNS,
        BLOCK_T=SUM_STEP,
    )
    sum.add_(partial.sum(0))


def _add_gram(x: Tensor, mask: Tensor | None, gram: Tensor, config: GramConfig) -> None:
    tokens, columns = x.shape
    panel = gram.shape[1]
    row_tiles, panel_tiles = triton.cdiv(columns, config.block), triton.cdiv(panel, config.block)
    tiles = panel_tiles * (panel_tiles + 1) // 2 + (row_tiles - panel_tiles) * panel_tiles
    if tiles == 0:
        return
    gram_kernel[(tiles,)](
        x,
        x if mask is None else mask,
        gram,
        tokens,
        columns,
        panel,
        x.stride(0),
        gram.stride(0),
        HAS_MASK=mask is not None,
        UPCAST=INTERPRET and x.dtype == torch.bfloat16,
        BLOCK=config.block,
        BLOCK_T=config.block_t,
        num_warps=config.warps,
        num_stages=config.stages,
    )

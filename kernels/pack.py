"""Pack activations for the product kernels, and add up columns, in one streaming pass.

    packed[p, t, j] = plane p of x[t, columns[j]],  zero where token t is masked or j is padding

Packing selects and orders columns, zeroes masked rows (the shape does not depend on the mask, so
nothing waits for the GPU and CUDA graphs can hold it), pads rows to an aligned stride, and writes
float32 as three bfloat16 planes. A gather inside the product kernel instead would take 2-byte
operands off the asynchronous copies, and reads x once for each row of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from liar_ext.kernels.runtime import interprets, on_device

# columns to which rows are padded: 32 bytes of a 16-bit type, so that any row of the result is
# aligned for tensor maps and Triton knows every stride to be a multiple of 16
ALIGN = 16

# tokens of one program, tokens of one step, columns. With 4 warps the sums take 40 registers and
# 1 KiB, so that two such programs fit beside one of a product kernel on the same multiprocessor
SPAN = 256
STEP = 8
BLOCK = 128
WARPS = 4

# elements of x below which a second stream is more work than the sums: 8 µs of reading
BESIDE = 2**24


@triton.jit(do_not_specialize=["tokens"])
def pack_kernel(
    x_ptr,
    mask_ptr,
    order_ptr,
    packed_ptr,
    sum_ptr,
    tokens,
    columns,
    width,
    natural,
    token_stride,
    column_stride,
    plane_stride,
    packed_stride,
    HAS_MASK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    WRITE: tl.constexpr,
    PLANES: tl.constexpr,
    SUM: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    real = j < columns
    source = tl.load(order_ptr + j, mask=real, other=0) if HAS_ORDER else j
    total = tl.zeros((STEP, BLOCK), dtype=tl.float64)
    for start in range(0, SPAN, STEP):
        token = part * SPAN + start + tl.arange(0, STEP)
        inside = token < tokens
        valid = inside
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
        row = token.to(tl.int64)[:, None]
        value = tl.load(
            x_ptr + row * token_stride + source.to(tl.int64)[None, :] * column_stride,
            mask=valid[:, None] & real[None, :],
            other=0.0,
        )
        if SUM:
            # bfloat16 to float64 in one step is not there on every architecture
            total += value.to(tl.float32).to(tl.float64)
        if WRITE:
            at = packed_ptr + row * packed_stride + j[None, :]
            written = inside[:, None] & (j < width)[None, :]
            if PLANES == 3:
                # each difference is exact, and what is left after three roundings to 8 bits is 0:
                # high + middle + low is x to the last of its 24 bits
                high = value.to(packed_ptr.dtype.element_ty)
                value = value - high.to(tl.float32)
                middle = value.to(packed_ptr.dtype.element_ty)
                value = value - middle.to(tl.float32)
                tl.store(at, high, mask=written)
                tl.store(at + plane_stride, middle, mask=written)
                tl.store(
                    at + plane_stride + plane_stride,
                    value.to(packed_ptr.dtype.element_ty),
                    mask=written,
                )
            else:
                tl.store(at, value, mask=written)
    if SUM:
        out = sum_ptr + part.to(tl.int64) * natural + source
        tl.store(out, tl.sum(total, axis=0), mask=real)


def pack(
    x: Tensor,
    token_mask: Tensor | None = None,
    columns: Tensor | None = None,
    planes: int = 1,
    align: int = ALIGN,
    sum: Tensor | None = None,
) -> Tensor:
    """Rows of `x` with masked ones zeroed and columns selected, ready for the product kernels.

    Args:
        x: (T, n) float32, float16 or bfloat16, any strides.
        token_mask: (T,) bool or uint8, or None.
        columns: (m,) int64 columns of x in their new order, or None for all as they are.
        planes: 1, or 3 to split float32 into bfloat16 planes high, middle, low with
            `x = high + middle + low` exactly (for |x| where none of them is subnormal).
        align: the row stride of the result is a multiple of this many elements.
        sum: (n,) float64 that the sums of the packed columns over valid tokens are added to, in
            the column order of x; each column may then be packed once only.
    Returns:
        (T, m) of the dtype of x, or (3, T, m) bfloat16 with planes = 3: a view of rows that are
        padded with zeros up to their stride.
    Raises:
        ValueError: planes is neither 1 nor 3, or 3 for an x that is not float32.
    """
    count = x.shape[1] if columns is None else columns.numel()
    packed = pack_padded(x, token_mask, columns, planes, align, sum)[:, :, :count]
    return packed if planes == 3 else packed[0]


def pack_padded(
    x: Tensor,
    token_mask: Tensor | None = None,
    columns: Tensor | None = None,
    planes: int = 1,
    align: int = ALIGN,
    sum: Tensor | None = None,
) -> Tensor:
    """`pack` with the padding: (planes, T, m rounded up to a multiple of `align`), contiguous."""
    if planes not in (1, 3) or (planes == 3 and x.dtype != torch.float32):
        raise ValueError(f"planes must be 1, or 3 for float32; got {planes} for {x.dtype}")
    width = padded(x.shape[1] if columns is None else columns.numel(), align)
    dtype = torch.bfloat16 if planes == 3 else x.dtype
    packed = torch.empty(planes, x.shape[0], width, dtype=dtype, device=x.device)
    if packed.numel():
        with on_device(x.device):
            partial = None if sum is None else _partial(x)
            _launch(x, token_mask, columns, packed, partial)
            if sum is not None and partial is not None:
                sum.add_(partial.sum(0))
    return packed


def padded(columns: int, align: int = ALIGN) -> int:
    """Columns of a packed row."""
    return triton.cdiv(columns, align) * align


def add_column_sums(x: Tensor, token_mask: Tensor | None, sum: Tensor) -> None:
    """`sum += Σ x` over the valid tokens, in float64: a pass over x that writes next to nothing.

    Args as in `pack`.
    """
    if x.numel():
        with on_device(x.device):
            partial = _partial(x)
            _launch(x, token_mask, None, None, partial)
            sum.add_(partial.sum(0))


def column_sums_beside(x: Tensor, token_mask: Tensor | None, sum: Tensor) -> Callable[[], None]:
    """`add_column_sums` beside what the current stream is given between this call and the next.

    The pass is limited by memory and the product kernels are not, so it costs no time of its own
    where its programs find room on the multiprocessors that those occupy. One after the other it
    would take 8 % of a Gram matrix of 4096 columns (the time of reading x at 4.3 TB/s over that of
    n² T operations at 650 TFLOP/s). Whether it does find room has not been measured.

    Returns:
        a function to call once that work was launched: it starts the pass on a second stream and
        makes the current one wait for it. Fork and join are events, which CUDA graphs record.
    """
    if interprets(x.device) or x.numel() < BESIDE:
        return lambda: add_column_sums(x, token_mask, sum)
    current, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    # made before the fork: nothing on the current stream touches it until both have joined again
    partial = _partial(x)
    ready = current.record_event()

    def finish() -> None:
        side.wait_event(ready)
        with torch.cuda.stream(side):
            _launch(x, token_mask, None, None, partial)
        current.wait_stream(side)
        sum.add_(partial.sum(0))

    return finish


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _partial(x: Tensor) -> Tensor:
    # zeros, because a packed selection of columns writes those only
    parts = triton.cdiv(x.shape[0], SPAN)
    return torch.zeros(parts, x.shape[1], dtype=torch.float64, device=x.device)


def _launch(
    x: Tensor,
    token_mask: Tensor | None,
    columns: Tensor | None,
    packed: Tensor | None,
    partial: Tensor | None,
) -> None:
    """Pack, write partial sums (one row for SPAN tokens), or both."""
    tokens, natural = x.shape
    count = natural if columns is None else columns.numel()
    width = count if packed is None else packed.shape[2]
    pack_kernel[(triton.cdiv(width, BLOCK), triton.cdiv(tokens, SPAN))](
        x,
        # what is absent still needs a pointer; the kernel never uses it
        x if token_mask is None else token_mask.contiguous().view(torch.uint8),
        x if columns is None else columns.contiguous(),
        x if packed is None else packed,
        x if partial is None else partial,
        tokens,
        count,
        width,
        natural,
        x.stride(0),
        x.stride(1),
        0 if packed is None else packed.stride(0),
        0 if packed is None else packed.stride(1),
        HAS_MASK=token_mask is not None,
        HAS_ORDER=columns is not None,
        WRITE=packed is not None,
        PLANES=1 if packed is None else packed.shape[0],
        SUM=partial is not None,
        SPAN=SPAN,
        STEP=STEP,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )

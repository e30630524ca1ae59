"""Column gather: `out[t, j] = x[t, columns[j]]`, zeros where the mask is off.

What a kernel needs that wants its columns in the order `[S | M]` and has no mask of its own. Rows
are blanked and not removed, so shapes do not depend on the mask and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops import backends, self_test
from liar_ext.ops.gram import no_triton


def pack_reference(
    x: Tensor, token_mask: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """The definition. Values are moved, never rounded; a blanked NaN is a zero too."""
    gathered = x.clone() if columns is None else x[:, columns]
    if token_mask is not None:
        gathered[~token_mask.bool()] = 0
    return gathered


def pack(x: Tensor, token_mask: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """Gather columns and blank masked rows.

    Args:
        x: (T, n) float32, float16 or bfloat16; any row stride.
        token_mask: (T,) True (non-zero) for valid tokens.
        columns: (m,) int64 indices into the columns of x, in any order; None for all. They are
            looked at, which waits for the device, except while a CUDA graph is captured.
    Returns:
        (T, m) of the dtype of x, contiguous, always a copy.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        BackendError: `LIAR_BACKEND` names a backend that cannot run this.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (tokens, columns) floating point; got {x.shape} {x.dtype}")
    if token_mask is not None and (
        token_mask.shape != x.shape[:1] or token_mask.device != x.device
    ):
        raise ValueError(
            f"token_mask must be ({x.shape[0]},) on {x.device}; "
            f"got {tuple(token_mask.shape)} on {token_mask.device}"
        )
    if columns is not None and (
        columns.ndim != 1 or columns.dtype != torch.int64 or columns.device != x.device
    ):
        raise ValueError(
            f"columns must be (m,) int64 on {x.device}; "
            f"got {tuple(columns.shape)} {columns.dtype} on {columns.device}"
        )
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if columns is not None and columns.numel() and not capturing:
        low, high = (int(value) for value in torch.stack(columns.aminmax()).tolist())
        if low < 0 or high >= x.shape[1]:
            raise ValueError(f"columns must lie in 0..{x.shape[1] - 1}; they span {low}..{high}")
    mask = None if token_mask is None else token_mask.bool()
    return pack_columns(x.detach(), mask, columns)


@torch.library.custom_op("liar_ext::pack", mutates_args=())
def pack_columns(x: Tensor, token_mask: Tensor | None, columns: Tensor | None) -> Tensor:
    """`pack` as a torch operator, on arguments already checked."""
    packed: Tensor = backends.select("pack", x.device, x.dtype).run(x, token_mask, columns)
    return packed


@pack_columns.register_fake
def _(x: Tensor, token_mask: Tensor | None, columns: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] if columns is None else columns.numel())


backends.register("pack", "reference")(pack_reference)


@backends.register("pack", "torch")
def _torch(x: Tensor, token_mask: Tensor | None, columns: Tensor | None) -> Tensor:
    gathered = x.contiguous() if columns is None else x.index_select(1, columns)
    if token_mask is None:
        return gathered.clone() if gathered.data_ptr() == x.data_ptr() else gathered
    # a select, because 0 · NaN is NaN
    return torch.where(token_mask[:, None], gathered, 0)


@backends.register("pack", "triton", no_triton, self_test=self_test.pack_error)
def _triton(x: Tensor, token_mask: Tensor | None, columns: Tensor | None) -> Tensor:
    """The Triton version: kernels/pack.py."""
    from liar_ext.kernels import pack as kernel

    return kernel.pack(x, token_mask, columns, align=1)

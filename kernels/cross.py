"""Cross moments with Triton: `C += Σ x yᵀ`, the full rectangle, by the kernels of Gram matrices."""

from __future__ import annotations

from torch import Tensor

from liar_ext.kernels import products, runtime
from liar_ext.kernels.config import ProductConfig
from liar_ext.kernels.pack import add_column_sums, column_sums_beside, pack_padded


def accumulate_cross(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
    *,
    kernel: str | None = None,
    config: ProductConfig | None = None,
) -> None:
    """Accumulate `Σ x yᵀ`, `Σ x` and `Σ y` over the valid tokens, in place.

    Args:
        x, y: (T, n) and (T, m) of one dtype: float32, float16 or bfloat16, any strides.
        token_mask: (T,) bool or None.
        cross: (n, m) float32, unit column stride. sum_x: (n,), sum_y: (m,) float64.
        kernel, config: as in `gram.accumulate`.
    Raises:
        ValueError: shapes or dtypes do not fit together.
        BackendError: as in `gram.accumulate`.
    """
    if x.shape[0] != y.shape[0] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"x and y must have the same tokens, dtype and device; got {tuple(x.shape)} {x.dtype} "
            f"on {x.device} and {tuple(y.shape)} {y.dtype} on {y.device}"
        )
    if tuple(cross.shape) != (x.shape[1], y.shape[1]):
        raise ValueError(f"cross must be ({x.shape[1]}, {y.shape[1]}); got {tuple(cross.shape)}")
    if x.shape[0] == 0:
        return
    mask = products.mask_bytes(token_mask)
    with runtime.on_device(x.device):
        if cross.numel() == 0:
            add_column_sums(x, mask, sum_x)
            add_column_sums(y, mask, sum_y)
            return
        chosen = products.plan([x, y], mask is not None, False, kernel, config)
        for start in range(0, x.shape[0], chosen.tokens):
            rows = slice(start, start + chosen.tokens)
            left, right, valid = x[rows], y[rows], None if mask is None else mask[rows]
            if chosen.packs:
                left = pack_padded(left, valid, None, chosen.planes, sum=sum_x)
                right = pack_padded(right, valid, None, chosen.planes, sum=sum_y)
                products.launch(chosen, left, right, None, cross, triangle=False)
            else:
                finish_x = column_sums_beside(left, valid, sum_x)
                finish_y = column_sums_beside(right, valid, sum_y)
                products.launch(chosen, left[None], right[None], valid, cross, triangle=False)
                finish_x()
                finish_y()

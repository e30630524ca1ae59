"""Gram accumulation with Triton: `G += X_oᵀ X_o[:, :s]` on and below the diagonal, `s += Σ x`.

Each program owns whole tiles of `G`: no atomics, the same bits every time. `tiles` has the list of
them, `gram_pointer` and `gram_descriptor` the kernels, `products` the choice between those.
"""

from __future__ import annotations

from torch import Tensor

from liar_ext.kernels import products, runtime
from liar_ext.kernels.config import ProductConfig
from liar_ext.kernels.pack import add_column_sums, column_sums_beside, pack_padded


def accumulate(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    *,
    kernel: str | None = None,
    config: ProductConfig | None = None,
) -> None:
    """Accumulate into `gram` and `sum` in place; `liar_ext.ops.gram` checks the arguments.

    Runs on the device of x and its current stream, waits for nothing, and does not look at any
    value, so a CUDA graph can hold it.

    Args:
        x: (T, n) float32, float16 or bfloat16 on a GPU (or on the CPU under TRITON_INTERPRET=1).
            Any strides: what the kernels cannot read in place is packed, 1 GiB at most at a time.
        token_mask: (T,) bool or None.
        order: (n,) int64 column order of `gram`, or None.
        gram: (n, s) float32, unit column stride; entries above the diagonal are not touched.
        sum: (n,) float64, natural order.
        kernel: "pointer" or "descriptor" to force one; None for `LIAR_GRAM_KERNEL`, or the best.
        config: launch parameters, or None for the committed ones.
    Raises:
        BackendError: the forced kernel cannot run here, the GPU is too old, or a launch failed.
    """
    if x.numel() == 0:
        return
    mask = products.mask_bytes(token_mask)
    with runtime.on_device(x.device):
        if gram.shape[1] == 0:
            add_column_sums(x, mask, sum)
            return
        chosen = products.plan([x], mask is not None, order is not None, kernel, config)
        for start in range(0, x.shape[0], chosen.tokens):
            part = x[start : start + chosen.tokens]
            valid = None if mask is None else mask[start : start + chosen.tokens]
            if chosen.packs:
                packed = pack_padded(part, valid, order, chosen.planes, sum=sum)
                products.launch(chosen, packed, packed, None, gram, triangle=True)
            else:
                finish = column_sums_beside(part, valid, sum)
                products.launch(chosen, part[None], part[None], valid, gram, triangle=True)
                finish()

"""The CUDA C++ implementation of `gram`, for Hopper: packing in front of csrc/cuda/gram_sm90.cu.

On an H200 the first choice there: bfloat16 triangles of 11008 and 28672 columns took it 6.6 and
45.7 ms for 32768 tokens, and the Triton kernels 8.0 and 64 ms (4096: 1.07 and 1.02).
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops import _native_gram, backends, self_test
from liar_ext.ops.gram import no_triton

# bytes of packed copies at a time
PACKED_BYTES = 2**30
# and tokens, so that the copies are asked for by rows and not by the size of the call
TOKENS = 65536


def _no_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _native_gram.unavailable(device, dtype)
    if reason is None and (packing := no_triton(device, dtype)) is not None:
        reason = f"what it reads is packed by Triton, and {packing}"
    return reason


@backends.register("gram", "cuda", _no_cuda, self_test=self_test.gram_error)
def _gram_cuda(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    """The Hopper kernel, on x itself where it can be read in place."""
    from liar_ext.kernels.pack import pack_padded, padded

    count.add_(x.shape[0] if token_mask is None else token_mask.sum())
    if x.numel() == 0:
        return
    planes = 3 if x.dtype == torch.float32 else 1
    if planes == 1 and order is None and token_mask is None and _native_gram.readable(x):
        _native_gram.gram_sm90(x, gram, sum)
        return
    tokens = max(1, min(TOKENS, PACKED_BYTES // (2 * planes * padded(x.shape[1]))))
    for start in range(0, x.shape[0], tokens):
        rows = slice(start, start + tokens)
        valid = None if token_mask is None else token_mask[rows]
        # the sums come from the copy: they are wanted in the natural order of the columns
        packed = pack_padded(x[rows], valid, order, planes, sum=sum)[:, :, : x.shape[1]]
        _native_gram.gram_sm90(packed if planes == 3 else packed[0], gram, None, planes)

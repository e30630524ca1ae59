"""Cosines of rows: how far the direction of a token's hidden state changes between two depths.

    c_t = x_t·y_t / (‖x_t‖ ‖y_t‖)

What depth scores are made of: Block Influence is `1 − mean c` of what enters and leaves a layer
(ShortGPT, arXiv 2403.03853), the windows of LLM-Streamline (arXiv 2403.19135) are those of the
largest mean, and `arccos(c) / π` is the angular distance of arXiv 2403.17887. Three sums of each
row are all it takes: `O(T d)`, where the diagonal of the matrix of all pairs of rows costs T times
that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liar_ext.ops import backends, self_test
from liar_ext.ops.gram import no_triton

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# elements of x that the torch version copies at a time. On one core of an AMD EPYC, d = 4096, 2^17
# to 2^19 are within 10 % of each other, and 2^20 takes half as long again; of those the largest,
# because with each chunk threads wait for one another five times
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 22}


def row_cosines_reference(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """The definition, in float64: every fast version is tested and benchmarked against this."""
    rows = (x, y) if valid is None else (x[valid], y[valid])
    left, right = (_direction(part.double()) for part in rows)
    return (left * right).sum(1).clamp(-1.0, 1.0)


def _direction(rows: Tensor) -> Tensor:
    """Rows over their norms; a row of zeros stays, one that is not finite becomes NaN."""
    # over the largest magnitude first: 1e200 and 1e-200 have no squares in float64
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest == 0, 1.0, largest)
    norm = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norm == 0, 1.0, norm)


def error_bound(columns: int) -> float:
    """Largest error of a cosine of `columns` values that is made of float32 sums.

    A sum in which no product meets more than k roundings of u = 2⁻²⁴ errs by at most k u Σ|xᵢyᵢ|,
    which is k u ‖x‖‖y‖ for x·y and k u of each square (Higham, Accuracy and Stability, 4.2). The
    roots pass on half of that and round once each; product and quotient once more: (2k + 4) u. In
    `kernels/cosine.py` k is a step of the loop for each 128 columns (256 where they are 16 bits
    wide), and 13 for products and for the sums of a thread and a warp. Powers of two and clamping
    add nothing. Errors of both signs mostly cancel: up to 8192 columns no more than 3e-7 was seen.
    """
    return (2 * (math.ceil(columns / 128) + 13) + 4) * 2.0**-24


def cosine_bytes(rows: int, columns: int, item: int, device: str) -> int:
    """The most that a call takes beside its result: copies of a chunk of the torch version.

    Args:
        item: bytes of a value. device: `cpu` or `cuda`.
    """
    # float64 rows are scaled into more of them; one of the others may be gathered first
    each = 5 * 8 if item == 8 else 2 * 8 + item
    return each * min(rows * columns, max(_CHUNK[device], columns))


def row_cosines(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosines of the rows of x with those of y.

    A row of zeros has no direction, so its cosine is 0, as that of two rows that have nothing in
    common. A NaN or an infinity in a row makes its cosine NaN, whatever the other one is. Nothing
    overflows or vanishes: a cosine does not depend on the size of its rows.

    Args:
        x, y: (T, d) float32, float16, bfloat16 or float64, not necessarily the same; any strides,
            d at least 1. With float64 sums are made in float64.
        valid: (V,) int64 indices of the rows that are wanted, in any order, or None for all. On a
            CPU they are looked at; on a GPU that would wait for it, and what is no row of x gives
            NaN there (or, in the torch version, PyTorch's own assertion).
    Returns:
        (V,) or (T,) float32, or float64 for float64, in [-1, 1], so that `arccos` exists. In
        float32, differences to ±1 below 1e-7 are rounding, and an angle of 3e-4 cannot be told
        from 0.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes, devices or indices do not fit together.
        BackendError: `LIAR_BACKEND` names a backend that cannot run this.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
        >>> row_cosines(x, torch.tensor([[4.0, 3.0], [-2e30, 0.0], [1.0, 1.0]]))
        tensor([ 0.9600, -1.0000,  0.0000])
    """
    _check(x, y, valid)
    found: Tensor = cosine_rows(x.detach(), y.detach(), valid)
    return found


@torch.library.custom_op("liar_ext::cosine_rows", mutates_args=())
def cosine_rows(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """`row_cosines` as a torch operator, on arguments already checked but for the indices."""
    if valid is not None and valid.device.type == "cpu" and valid.numel():
        low, high = (int(value) for value in valid.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"valid must lie in 0..{x.shape[0] - 1}; it spans {low}..{high}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    cosines: Tensor = backends.select("cosine", x.device, dtype).run(x, y, valid)
    return cosines


@cosine_rows.register_fake
def _(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    return _empty(x, y, valid)


def _empty(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    wide = torch.float64 in (x.dtype, y.dtype)
    count = x.shape[0] if valid is None else valid.shape[0]
    return x.new_empty(count, dtype=torch.float64 if wide else torch.float32)


def _check(x: Tensor, y: Tensor, valid: Tensor | None) -> None:
    for name, value in (("x", x), ("y", y), ("valid", valid)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] == 0:
        raise ValueError(
            "x and y must both be (tokens, columns), of the same tokens and at least one column; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype not in _DTYPES or y.dtype not in _DTYPES or x.device != y.device:
        raise ValueError(
            "x and y must be float32, float16, bfloat16 or float64, on one device; "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    if valid is not None and (
        valid.ndim != 1 or valid.dtype != torch.int64 or valid.device != x.device
    ):
        raise ValueError(
            f"valid must be (rows,) int64 indices on {x.device}; "
            f"got {tuple(valid.shape)} {valid.dtype} on {valid.device}"
        )


@backends.register("cosine", "reference")
def _reference(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    return _empty(x, y, valid).copy_(row_cosines_reference(x, y, valid))


@backends.register("cosine", "torch")
def _torch(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """Chunks of rows in float64, where squares of a float32 neither overflow nor vanish.

    Those of a float64 do, so float64 rows are scaled as the definition does it. Scaling float32
    ones instead took 5 times as long on a CPU: reading the largest magnitude is the slow part.
    """
    out = _empty(x, y, valid)
    rows = max(1, min(len(out), _CHUNK.get(x.device.type, _CHUNK["cpu"]) // x.shape[1]))
    # the same memory for every chunk: new pages each time took 5 times as long for bfloat16
    wide = x.new_empty(2, rows, x.shape[1], dtype=torch.float64)
    for number, part in enumerate(out.split(rows)):
        own, pair = slice(number * rows, number * rows + len(part)), wide[:, : len(part)]
        for copied, value in zip(pair, (x, y), strict=True):
            copied.copy_(value[own] if valid is None else value.index_select(0, valid[own]))
        if out.dtype == torch.float64:
            part.copy_(row_cosines_reference(*pair))
            continue
        norms = torch.linalg.vector_norm(pair, dim=2).prod(0)
        # 0 · ∞ and 0 · NaN are NaN: norms are 0 where one row is zero and the other one finite
        norms = torch.where(norms == 0, 1.0, norms)
        # what is above 1 in the last bits of float64 is 1 in float32
        part.copy_(pair[0].mul_(pair[1]).sum(1).div_(norms))
    return out


@backends.register("cosine", "triton", no_triton, self_test=self_test.cosine_error)
def _triton(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """The Triton version: kernels/cosine.py."""
    from liar_ext.kernels.cosine import row_cosines as kernel

    return kernel(x, y, valid)

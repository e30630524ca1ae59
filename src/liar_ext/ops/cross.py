"""Cross moments `Σ x yᵀ` of two paths over the same tokens, for drift-aware reconstruction.

`x` are the inputs of a consumer in the dense model and `y` those in the pruned one; with
`W' = W Cov(x, y) (Cov(y) + λI)⁻¹` the pruned consumer aims at what the dense one would have said.
The product is not symmetric, so all of it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.ops import backends, self_test
from liar_ext.ops.gram import TOKENS, no_triton
from liar_ext.ops.precision import full_precision, no_autocast


@dataclass
class CrossMoments:
    """Count, sums and products of pairs of rows. Additive, like Moments.

    Attributes:
        count: 0-dim int64. sum_x, sum_y: (n,) and (m,) float64. cross: (n, m) float32 or float64.
    """

    count: Tensor
    sum_x: Tensor
    sum_y: Tensor
    cross: Tensor

    @classmethod
    def zeros(
        cls,
        rows: int,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> CrossMoments:
        """Empty ones for `rows` columns of x and `columns` columns of y."""
        return cls(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.float64, device=device),
            torch.zeros(columns, dtype=torch.float64, device=device),
            torch.zeros(rows, columns, dtype=dtype, device=device),
        )

    def __add__(self, other: CrossMoments) -> CrossMoments:
        if self.cross.shape != other.cross.shape:
            raise ValueError(
                f"cross moments of shapes {tuple(self.cross.shape)} and "
                f"{tuple(other.cross.shape)} cannot be added"
            )
        return CrossMoments(
            self.count + other.count,
            self.sum_x + other.sum_x,
            self.sum_y + other.sum_y,
            self.cross + other.cross,
        )

    def __sub__(self, other: CrossMoments) -> CrossMoments:
        """Of the tokens of `self` that are not in `other`, which has some of them."""
        if self.cross.shape != other.cross.shape:
            raise ValueError(
                f"cross moments of shapes {tuple(self.cross.shape)} and "
                f"{tuple(other.cross.shape)} cannot be subtracted"
            )
        return CrossMoments(
            self.count - other.count,
            self.sum_x - other.sum_x,
            self.sum_y - other.sum_y,
            self.cross - other.cross,
        )

    def covariance(self) -> Tensor:
        """`Σ x yᵀ/N − μ_x μ_yᵀ`, (n, m) float64."""
        count = self.count.clamp(min=1)
        return (
            self.cross.double().div_(count).addr_(self.sum_x / count, self.sum_y / count, alpha=-1)
        )


def cross_reference(x: Tensor, y: Tensor, token_mask: Tensor | None = None) -> CrossMoments:
    """The definition, in float64."""
    valid = slice(None) if token_mask is None else token_mask.bool()
    x, y = x[valid].double(), y[valid].double()
    count = torch.tensor(x.shape[0], device=x.device)
    return CrossMoments(count, x.sum(0), y.sum(0), x.T @ y)


def cross(
    x: Tensor, y: Tensor, token_mask: Tensor | None = None, out: CrossMoments | None = None
) -> CrossMoments:
    """Accumulate the cross moments of a chunk of activations.

    Args:
        x, y: (T, n) and (T, m), both float32, float16 or bfloat16, or float64 with float64 `out`;
            any row stride.
        token_mask: (T,) True (non-zero) for valid tokens.
        out: CrossMoments to accumulate into, or None for new float32 ones.
    Returns:
        `out`, or new ones.
    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        BackendError: `LIAR_BACKEND` names a backend that cannot run this.

    Example:
        >>> cross(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])).cross
        tensor([[13., 16.]])
    """
    if out is None:
        out = CrossMoments.zeros(x.shape[-1], y.shape[-1], device=x.device)
    _check(x, y, token_mask, out)
    mask = None if token_mask is None else token_mask.bool()
    with no_autocast(x.device):
        cross_accumulate(x.detach(), y.detach(), mask, out.cross, out.sum_x, out.sum_y, out.count)
    return out


@torch.library.custom_op(
    "liar_ext::cross_accumulate", mutates_args=("cross", "sum_x", "sum_y", "count")
)
def cross_accumulate(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
    count: Tensor,
) -> None:
    """`cross` as a torch operator on the tensors of CrossMoments, already checked."""
    dtype = cross.dtype if cross.dtype == torch.float64 else x.dtype
    backends.select("cross", x.device, dtype).run(x, y, token_mask, cross, sum_x, sum_y)
    count.add_(x.shape[0] if token_mask is None else token_mask.sum())


@cross_accumulate.register_fake
def _(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
    count: Tensor,
) -> None:
    return None


def _check(x: Tensor, y: Tensor, token_mask: Tensor | None, out: CrossMoments) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x and y must be (tokens, columns) of the same tokens; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        raise ValueError(
            f"x and y must share a floating dtype and a device; "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    if token_mask is not None and (
        token_mask.shape != x.shape[:1] or token_mask.device != x.device
    ):
        raise ValueError(
            f"token_mask must be ({x.shape[0]},) on {x.device}; "
            f"got {tuple(token_mask.shape)} on {token_mask.device}"
        )
    wide = out.cross.dtype == torch.float64
    if out.cross.dtype not in (torch.float32, torch.float64) or (
        x.dtype == torch.float64 and not wide
    ):
        raise ValueError(f"out.cross cannot be {out.cross.dtype} for {x.dtype} activations")
    for name, value, shape, dtype in (
        ("cross", out.cross, (x.shape[1], y.shape[1]), out.cross.dtype),
        ("sum_x", out.sum_x, (x.shape[1],), torch.float64),
        ("sum_y", out.sum_y, (y.shape[1],), torch.float64),
        ("count", out.count, (), torch.int64),
    ):
        fits = tuple(value.shape) == shape and value.dtype == dtype and value.is_contiguous()
        if not fits or value.device != x.device:
            raise ValueError(
                f"out.{name} must be a contiguous {shape} {dtype} on {x.device}; "
                f"got {tuple(value.shape)} {value.dtype} on {value.device}"
            )


@backends.register("cross", "reference")
def _reference(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
) -> None:
    found = cross_reference(x, y, token_mask)
    cross.add_(found.cross)
    sum_x.add_(found.sum_x)
    sum_y.add_(found.sum_y)


@backends.register("cross", "torch")
def _torch(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
) -> None:
    if token_mask is not None:
        x, y = x[token_mask], y[token_mask]
    # products of 16-bit values are exact in float32, and CUDA can also add them up there
    native = x.is_cuda and x.element_size() == 2 and cross.dtype == torch.float32
    with full_precision():
        tokens = TOKENS.get(x.device.type, 4096)
        for left, right in zip(x.split(tokens), y.split(tokens), strict=True):
            sum_x.add_(left.sum(0, dtype=torch.float64))
            sum_y.add_(right.sum(0, dtype=torch.float64))
            if native:
                cross.add_(torch.mm(left.T, right, out_dtype=torch.float32))
            else:
                cross.addmm_(left.to(cross.dtype).T, right.to(cross.dtype))


@backends.register("cross", "triton", no_triton, self_test=self_test.cross_error)
def _triton(
    x: Tensor,
    y: Tensor,
    token_mask: Tensor | None,
    cross: Tensor,
    sum_x: Tensor,
    sum_y: Tensor,
) -> None:
    """The Triton version: kernels/cross.py."""
    from liar_ext.kernels.cross import accumulate_cross

    accumulate_cross(x, y, token_mask, cross, sum_x, sum_y)

"""Gram accumulation: `N += |valid|`, `s += Σ x`, `G += Σ x xᵀ` over the valid rows of a chunk.

Only the lower triangle of `G` is computed, and with `keep` only its kept columns: half the
multiplications of `x.T @ x`, or less. Sums are float32 at least whatever the dtype of `x`, because
a Gram matrix rounded to bfloat16 is not positive definite any more.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from liar_ext.ops import _extension, backends, self_test
from liar_ext.ops.moments import Moments
from liar_ext.ops.precision import full_precision, no_autocast

# columns of G per call: at n = 4096, T = 4096 on 2 cores, 256 to 1024 are within 5 % of each other;
# on a GPU wider panels keep the device full
_PANEL = {"cpu": 512, "cuda": 2048}

# tokens per call: bounds the float32 copy of 16-bit input on a CPU, and on a GPU the length of one
# tensor-core accumulation, whose rounding is one-sided (`kernels.tune.longest_sum`)
TOKENS = {"cpu": 4096, "cuda": 1024}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def gram_reference(
    x: Tensor, token_mask: Tensor | None = None, keep: Tensor | None = None
) -> Moments:
    """The definition, in float64: every fast version is tested and benchmarked against this."""
    rows = x.double() if token_mask is None else x[token_mask.bool()].double()
    moments = Moments.zeros(x.shape[1], dtype=torch.float64, device=x.device, keep=keep)
    ordered = rows if moments.order is None else rows[:, moments.order]
    moments.count += rows.shape[0]
    moments.sum += rows.sum(0)
    moments.gram += ordered.T @ ordered[:, : moments.gram.shape[1]]
    return moments


def gram(
    x: Tensor,
    token_mask: Tensor | None = None,
    out: Moments | None = None,
    keep: Tensor | None = None,
) -> Moments:
    """Accumulate the Moments of a chunk of activations.

    The backend is `LIAR_BACKEND`, or the first usable one of `backends.PREFERENCE`. Values are not
    checked: a NaN or an infinity in a valid row reaches `sum`, where it is cheap to find. With
    `out`, and after a first call with it, the Triton version can be captured in a CUDA graph: it
    waits for nothing and runs on the current stream and the device of `x`.

    Args:
        x: (T, n) activations, float32, float16 or bfloat16, or float64 with float64 `out`. T may be
            0. Rows may have any stride; columns that are not contiguous are copied.
        token_mask: (T,) True (non-zero) for valid tokens; padding never enters the sums.
        out: Moments to accumulate into, on the device of `x`, or None for new float32 ones.
        keep: (s,) integer kept columns of new Moments, each once; only `G_SS` and `G_MS` are
            accumulated. With `out` it may be given again and must be the same.
    Returns:
        `out`, or new float32 Moments. Entries of `gram` above the diagonal are unspecified.
    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes, devices or `keep` do not fit together.
        BackendError: `LIAR_BACKEND` names a backend that cannot run this.

    Example:
        >>> moments = gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> moments.gram.tril()
        tensor([[10.,  0.],
                [14., 20.]])
    """
    for name, value in (("x", x), ("token_mask", token_mask), ("keep", keep)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    _check(x, token_mask)
    if keep is not None:
        keep = _check_keep(keep, x)
    if out is None:
        if x.dtype == torch.float64:
            raise ValueError(
                "x is float64 and new Moments are float32: "
                "pass out=Moments.zeros(n, dtype=torch.float64), or convert x"
            )
        out = Moments.zeros(x.shape[1], device=x.device, keep=keep)
    else:
        _check_out(out, x, keep)
    mask = None if token_mask is None else token_mask.bool()
    out.mirrored = False
    with no_autocast(x.device):
        gram_accumulate(x.detach(), mask, out.order, out.gram, out.sum, out.count)
    return out


@torch.library.custom_op("liar_ext::gram_accumulate", mutates_args=("gram", "sum", "count"))
def gram_accumulate(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    """`gram` as a torch operator on the tensors of a Moments, already checked."""
    dtype = gram.dtype if gram.dtype == torch.float64 else x.dtype
    backends.select("gram", x.device, dtype).run(x, token_mask, order, gram, sum, count)


@gram_accumulate.register_fake
def _(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    return None


def _check(x: Tensor, token_mask: Tensor | None) -> None:
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(
            f"x must be (tokens, columns) with at least one column; got shape {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64; got {x.dtype}")
    if token_mask is not None:
        if token_mask.shape != x.shape[:1]:
            raise ValueError(
                f"token_mask must have shape {tuple(x.shape[:1])}, one entry per row of x; "
                f"got {tuple(token_mask.shape)}"
            )
        if token_mask.device != x.device:
            raise ValueError(f"token_mask is on {token_mask.device} and x on {x.device}")


def _check_keep(keep: Tensor, x: Tensor) -> Tensor:
    columns = x.shape[1]
    if keep.ndim != 1 or keep.dtype == torch.bool or keep.is_floating_point():
        raise ValueError(
            f"keep must be (s,) integer column indices; got shape {tuple(keep.shape)} {keep.dtype}"
        )
    keep = keep.to(device=x.device, dtype=torch.int64)
    if keep.numel() and (int(keep.min()) < 0 or int(keep.max()) >= columns):
        raise ValueError(
            f"keep must lie in 0..{columns - 1}; it spans {int(keep.min())}..{int(keep.max())}"
        )
    if keep.unique().numel() != keep.numel():
        raise ValueError(
            f"keep repeats columns: {keep.numel()} entries, {keep.unique().numel()} distinct"
        )
    return keep


def _check_out(out: Moments, x: Tensor, keep: Tensor | None) -> None:
    columns = x.shape[1]
    if out.columns != columns or out.gram.shape[0] != columns:
        raise ValueError(f"out is for {out.columns} columns and x has shape {tuple(x.shape)}")
    if out.gram.device != x.device:
        raise ValueError(f"out is on {out.gram.device} and x on {x.device}")
    if out.gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out.gram must be float32 or float64; got {out.gram.dtype}")
    if x.dtype == torch.float64 and out.gram.dtype != torch.float64:
        raise ValueError("x is float64 and out float32: use float64 Moments, or convert x")
    # the C++ version writes through these pointers
    for name, value, dtype, shape in (
        ("sum", out.sum, torch.float64, (columns,)),
        ("count", out.count, torch.int64, ()),
    ):
        if value.dtype != dtype or tuple(value.shape) != shape or value.device != x.device:
            raise ValueError(
                f"out.{name} must be {shape} {dtype} on {x.device}; "
                f"got {tuple(value.shape)} {value.dtype} on {value.device}"
            )
    if not out.sum.is_contiguous():
        raise ValueError("out.sum must be contiguous")
    if out.order is not None and out.checked is not out.order:
        every = torch.arange(columns, device=x.device)
        if out.order.device != x.device or not torch.equal(out.order.sort().values, every):
            raise ValueError("out.order must be a permutation of the columns, on the device of x")
        out.checked = out.order
    if out.gram.shape[1] > 1 and out.gram.stride(1) != 1:
        raise ValueError(f"out.gram must have unit column stride; got {out.gram.stride()}")
    panel = out.gram.shape[1]
    if panel > columns:
        raise ValueError(f"out.gram has {panel} columns, x only {columns}")
    if keep is not None:
        first = torch.arange(panel, device=x.device) if out.order is None else out.order[:panel]
        if not torch.equal(first, keep):
            raise ValueError("keep differs from the columns that out was made with")


@backends.register("gram", "reference")
def _gram_reference(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    panel = gram.shape[1]
    keep = torch.arange(panel, device=x.device) if order is None else order[:panel]
    moments = gram_reference(x, token_mask, keep)
    count.add_(moments.count)
    sum.add_(moments.sum)
    gram.add_(moments.gram)


@backends.register("gram", "torch")
def _gram_torch(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    """Panels of the lower triangle by `addmm`, on any device."""
    rows = x if token_mask is None else x[token_mask]
    count.add_(rows.shape[0])
    tokens, width = TOKENS.get(x.device.type, 4096), _PANEL.get(x.device.type, 512)
    # products of 16-bit values are exact in float32, and CUDA can also add them up there
    native = x.is_cuda and x.element_size() == 2 and gram.dtype == torch.float32
    with full_precision():
        for part in rows.split(tokens):
            sum.add_(part.sum(0, dtype=torch.float64))
            chunk = part if native else part.to(gram.dtype)
            chunk = chunk if order is None else chunk[:, order]
            for start in range(0, gram.shape[1], width):
                stop = min(start + width, gram.shape[1])
                left, right = chunk[:, start:].T, chunk[:, start:stop]
                panel = gram[start:, start:stop]
                if native:
                    panel.add_(torch.mm(left, right, out_dtype=torch.float32))
                else:
                    panel.addmm_(left, right)


def _no_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    if dtype not in _extension.DTYPES:
        return f"it accumulates in float32, not in {dtype}"
    return _extension.unavailable()


@backends.register("gram", "cpu", _no_cpu)
def _gram_cpu(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    """The C++ version: csrc/cpu/gram.cpp."""
    rows = None if token_mask is None else token_mask.nonzero().flatten()
    count.add_(x.shape[0] if rows is None else rows.numel())
    _extension.gram(x, rows, order, gram, sum, path="auto")


def no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it accumulates in float32, not in torch.float64"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'liar-ext[triton]'"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA tensor, not {device.type} (TRITON_INTERPRET=1 runs it, slowly)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None


@backends.register("gram", "triton", no_triton, self_test=self_test.gram_error)
def _gram_triton(
    x: Tensor,
    token_mask: Tensor | None,
    order: Tensor | None,
    gram: Tensor,
    sum: Tensor,
    count: Tensor,
) -> None:
    """The Triton version: kernels/gram.py."""
    from liar_ext.kernels import gram as kernel

    count.add_(x.shape[0] if token_mask is None else token_mask.sum())
    kernel.accumulate(x, token_mask, order, gram, sum)

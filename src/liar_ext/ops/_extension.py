"""The compiled extension (csrc/), loaded on first use: tensors here, raw pointers there."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# first: the extension then shares the OpenMP runtime and finds the BLAS that torch has loaded
import torch
from torch import Tensor

from liar_ext.errors import BackendError

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# the ways the C++ version can multiply; csrc/liar.h says what each is
PATHS = ("auto", "avx512_bf16", "avx512", "blas", "generic")


@functools.cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return importlib.import_module("liar_ext.ops._native")
    except ModuleNotFoundError:
        return (
            "the C++ extension is not built; reinstall with LIAR_EXT_BUILD=cpu to see why "
            "(it needs a C++17 compiler)"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"


def unavailable() -> str | None:
    """Why the extension cannot be used, or None when it can."""
    native = _load()
    return native if isinstance(native, str) else None


def module() -> ModuleType:
    """The extension.

    Raises:
        BackendError: it is not built or does not load.
    """
    native = _load()
    if isinstance(native, str):
        raise BackendError(native)
    return native


def gram_path(dtype: torch.dtype) -> str:
    """The path that `auto` takes here for activations of `dtype`."""
    native = module()
    code = native.gram_cpu_path(int(getattr(native.Dtype, DTYPES[dtype])))
    return str(native.Path(code).name)


def gram_paths(dtype: torch.dtype) -> list[str]:
    """The paths that can run here for activations of `dtype`."""
    native = module()
    code = int(getattr(native.Dtype, DTYPES[dtype]))
    return [p for p in PATHS[1:] if native.gram_cpu_can(int(getattr(native.Path, p)), code)]


def gram(
    x: Tensor, rows: Tensor | None, order: Tensor | None, gram: Tensor, sum: Tensor, path: str
) -> None:
    """`gram += X_oᵀ X_o[:, :panel]` on and below the diagonal, `sum += Σ x`, on a CPU.

    Args:
        x: (T, n) float32, float16 or bfloat16; any row stride.
        rows: int64 indices of the valid rows, or None for all.
        order: (n,) int64 column order, or None.
        gram: (n, s) float32, unit column stride. sum: (n,) float64.
        path: one of `PATHS`.
    """
    native = module()
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    rows = None if rows is None else rows.contiguous()
    order = None if order is None else order.contiguous()
    native.gram_cpu(
        x.data_ptr(),
        int(getattr(native.Dtype, DTYPES[x.dtype])),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0 if rows is None else rows.data_ptr(),
        # an empty tensor has a null pointer too, so the count says which it is
        -1 if rows is None else rows.numel(),
        0 if order is None else order.data_ptr(),
        gram.data_ptr(),
        gram.stride(0),
        gram.shape[1],
        sum.data_ptr(),
        torch.get_num_threads(),
        int(getattr(native.Path, path)),
    )


def cuda_info() -> dict[str, Any] | None:
    """What the CUDA sources were compiled for and what each device runs; None in a CPU build."""
    native = _load()
    return None if isinstance(native, str) else native.cuda_info()


def cuda_obstacle(device: torch.device) -> str | None:
    """Why no CUDA code of the extension runs on `device`, or None.

    Args:
        device: with its index where its type is cuda.
    """
    if device.type != "cuda":
        return f"it needs a CUDA tensor, not {device.type}"
    if (reason := unavailable()) is not None:
        return reason
    if not hasattr(module(), "cuda_device"):
        return "the extension was built without CUDA; reinstall with LIAR_EXT_BUILD=cuda"
    entry = _cuda_device(torch.cuda.current_device() if device.index is None else device.index)
    if "error" in entry:
        return f"the CUDA runtime says: {entry['error']}"
    if entry["runs"] == 0:
        return (
            f"no code for compute capability {entry['capability'] / 10:.1f}; "
            f"compiled for {entry['compiled']}"
        )
    return None


@functools.cache
def _cuda_device(index: int) -> dict[str, Any]:
    """Asked once, and of this device alone: the question makes a context on it."""
    entry: dict[str, Any] = module().cuda_device(index)
    return entry


@contextmanager
def cuda_stream(device: torch.device) -> Iterator[int]:
    """The address of the current stream of `device`, which is the current device meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream

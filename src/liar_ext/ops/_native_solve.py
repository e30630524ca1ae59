"""The CUDA C++ side of the batched solve (csrc/cuda/solve_*.cu): tensors here, raw pointers there.

Nothing here waits for the device, so everything can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from liar_ext.errors import BackendError
from liar_ext.ops import _extension
from liar_ext.ops.attempt import Attempt

# rows of a system that one thread block solves, and of a panel
MAXIMUM = 128
WORKING = (torch.float64, torch.float32)

# names of this module, so that the emulator can take their place
_library, _stream = _extension.module, _extension.cuda_stream


def unavailable(
    device: torch.device, size: int = MAXIMUM, working: torch.dtype = torch.float64
) -> str | None:
    """Why `solve_small` cannot run systems of `size` rows on `device`, or None when it can."""
    if size > MAXIMUM:
        return f"one thread block solves up to {MAXIMUM} rows, not {size}"
    return _unavailable(_indexed(device), size, working)


def panel_unavailable(device: torch.device, working: torch.dtype = torch.float64) -> str | None:
    """Why `panel` cannot run on `device`, or None when it can."""
    return _unavailable(_indexed(device), None, working)


def solve_small(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype = torch.float64,
) -> Attempt:
    """`attempt` for systems of up to `MAXIMUM` rows: one launch, and one to add up the residuals.

    Args:
        matrix: (b, s, s) float64; only the lower triangle is read.
        right: (b, s, r) float64. strength: (b,) float64, λ.
        mean_kept, mean_dropped: (b, s) and (b, r) float64, or None.
        working: float64, or float32 with up to 5 refinement steps.
    Raises:
        ValueError: an argument has another shape, dtype or device.
        BackendError: the device cannot run it.
    """
    batch, size, columns = right.shape
    tensors: dict[str, tuple[Tensor, tuple[int, ...]]]
    tensors = {"matrix": (matrix, (batch, size, size)), "right": (right, (batch, size, columns))}
    tensors["strength"] = (strength, (batch,))
    if (mean_kept is None) != (mean_dropped is None):
        raise ValueError("give mean_kept and mean_dropped together, or neither")
    if mean_kept is not None and mean_dropped is not None:
        tensors["mean_kept"] = (mean_kept, (batch, size))
        tensors["mean_dropped"] = (mean_dropped, (batch, columns))
    for name, (tensor, shape) in tensors.items():
        _check(name, tensor, shape, torch.float64, matrix.device)
    if (reason := unavailable(matrix.device, size, working)) is not None:
        raise BackendError(f"the CUDA solve cannot run: {reason}")
    matrix, right = _unit_stride(matrix), _unit_stride(right)
    strength = strength.contiguous()
    kept = None if mean_kept is None else mean_kept.contiguous()
    dropped = None if mean_dropped is None else mean_dropped.contiguous()
    native = _library()
    attempt = Attempt(
        matrix.new_empty(batch, size, columns),
        matrix.new_empty(batch, columns),
        matrix.new_empty(batch, dtype=torch.int32),
        *(matrix.new_empty(batch) for _ in range(4)),
    )
    # zero rows: nothing to launch, and nothing that could be singular
    if size == 0:
        for output, value in zip(attempt, (0.0, 0.0, 0, 1.0, 1.0, 1.0, 0.0), strict=True):
            output.fill_(value)
        if dropped is not None:
            attempt.shift.copy_(dropped)
        return attempt
    workspace = matrix.new_empty(native.solve_small_workspace(batch, columns))
    with _stream(matrix.device) as stream:
        native.solve_small(
            *(matrix.data_ptr(), matrix.stride(0), matrix.stride(1)),
            *(right.data_ptr(), right.stride(0), right.stride(1)),
            strength.data_ptr(),
            0 if kept is None or dropped is None else kept.data_ptr(),
            0 if kept is None or dropped is None else dropped.data_ptr(),
            *(output.data_ptr() for output in attempt),
            workspace.data_ptr(),
            *(batch, size, columns, int(working == torch.float32)),
            stream,
        )
    return attempt


def panel(matrix: Tensor, inverse: Tensor, info: Tensor, pivot: Tensor, first: int) -> None:
    """Factor the diagonal blocks of a batch in place: the panel step of `blocked.factor`.

    Args:
        matrix: (b, n, n) float64 or float32 with n ≤ `MAXIMUM`, unit column stride: its lower
            triangle becomes the factor.
        inverse: (b, n, n), same dtype, unit column stride: receives the factor's inverse.
        info: (b,) int32: where it is 0, `first` + 1 + the index of the first bad pivot goes in.
        pivot: (b,) float64: running minimum of the pivots.
        first: row of the whole matrix that the block starts at.
    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    batch, size = matrix.shape[:2]
    if size > MAXIMUM:
        raise ValueError(f"a panel has at most {MAXIMUM} rows; got {size}")
    if matrix.dtype not in WORKING:
        raise ValueError(f"matrix must be float64 or float32; got {matrix.dtype}")
    for name, tensor in (("matrix", matrix), ("inverse", inverse)):
        _check(name, tensor, (batch, size, size), matrix.dtype, matrix.device)
        if tensor.stride(2) != 1 and size > 1:
            raise ValueError(f"{name} is written in place: its column stride must be 1")
    for name, tensor, dtype in (("info", info, torch.int32), ("pivot", pivot, torch.float64)):
        _check(name, tensor, (batch,), dtype, matrix.device)
    with _stream(matrix.device) as stream:
        _library().solve_panel(
            *(matrix.data_ptr(), matrix.stride(0), matrix.stride(1)),
            *(inverse.data_ptr(), inverse.stride(0), inverse.stride(1)),
            *(info.data_ptr(), pivot.data_ptr()),
            *(batch, size, first, int(matrix.dtype == torch.float32)),
            stream,
        )


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {shape} {dtype} on {device}; "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# asked before every launch, and the answer does not change
@functools.cache
def _unavailable(device: torch.device, size: int | None, working: torch.dtype) -> str | None:
    """Why a system of `size` rows, or for None a panel, cannot be factored on `device`."""
    if working not in WORKING:
        return f"the working precision is float64 or float32, not {working}"
    if (reason := _extension.cuda_obstacle(device)) is not None:
        return reason
    native, single = _library(), int(working == torch.float32)
    if size is None:
        needed = native.solve_panel_shared(single)
    else:
        needed = native.solve_small_shared(max(size, 1), single)
    limit = native.solve_shared_limit(device.index)
    if needed <= limit:
        return None
    return f"it takes {needed} bytes of shared memory, and a block has {limit}"


def _indexed(device: torch.device) -> torch.device:
    if str(device) != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device())

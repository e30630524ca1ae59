"""The CUDA C++ Gram kernel for Hopper (csrc/cuda/gram_sm90.cu): tensors here, raw pointers there.

Nothing here waits for the device, so everything can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.errors import BackendError
from liar_ext.ops import _extension

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)

# elements of 16 bits in the 16 bytes that the copy engine aligns rows to
ALIGNMENT = 8

# names of this module, so that the emulator can take their place
_library, _stream = _extension.module, _extension.cuda_stream


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve activations of `dtype` on `device`, or None when it can.

    float32 activations are served as three bfloat16 planes.
    """
    if dtype not in (*DTYPES, torch.float32):
        return f"it accumulates in float32, not in {dtype}"
    if (reason := _extension.cuda_obstacle(device)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return (
            f"its instructions exist on compute capability {CAPABILITY[0]}.{CAPABILITY[1]} only, "
            f"this device has {capability[0]}.{capability[1]}"
        )
    return None


def readable(x: Tensor, planes: int = 1) -> bool:
    """Whether the copy engine can read `x` in place, (T, n) or with planes (3, T, n)."""
    row, plane = _strides(x, planes)
    columns = x.shape[-1]
    unit = columns == 1 or x.stride(-1) == 1
    aligned = row % ALIGNMENT == 0 and x.data_ptr() % 16 == 0
    return unit and aligned and row >= max(columns, 1) and plane % row == 0


def gram_sm90(
    x: Tensor,
    gram: Tensor,
    sum: Tensor | None,
    planes: int = 1,
    *,
    tile: int = 0,
    period: int = 0,
    blocks: int = 0,
    cluster: int = 0,
) -> None:
    """`gram += Xᵀ X[:, :s]` on and below the diagonal, `sum += Σ x`; no other entry is touched.

    Every entry is added to once, and nothing depends on timing.

    Args:
        x: (T, n) bfloat16 or float16 with unit column stride, rows a multiple of 8 elements apart
            and a 16-byte aligned start; with `planes=3` (3, T, n) bfloat16 planes whose sum is the
            data, largest first. Columns are in the order of `gram`; masked rows are zero.
        gram: (n, s) float32 with unit column stride.
        sum: (n,) float64, in the order of `x`, or None.
        planes: 1 or 3.
        tile: columns of a tile of `gram`, 128 or 256; 0 chooses by the shape.
        period: stages of 64 tokens (32 with three planes) between two moves of the running sums
            out of the tensor cores; 0 for the default, 6 (3 with planes).
        blocks: thread blocks at most; 0 for one per multiprocessor.
        cluster: thread blocks that share loads, 1 or 2 (tiles of 256 columns only); 0 for 1.
    Raises:
        ValueError: an argument has another shape, dtype, device, stride or alignment.
        BackendError: the device cannot run it.
    """
    if planes not in (1, 3):
        raise ValueError(f"planes must be 1 or 3; got {planes}")
    if x.ndim != (2 if planes == 1 else 3) or (planes == 3 and x.shape[0] != 3):
        wanted = "(tokens, columns)" if planes == 1 else "(3, tokens, columns)"
        raise ValueError(f"x must be {wanted} with planes={planes}; got shape {tuple(x.shape)}")
    dtypes = DTYPES if planes == 1 else (torch.bfloat16,)
    if x.dtype not in dtypes:
        raise ValueError(f"x must be {' or '.join(map(str, dtypes))}; got {x.dtype}")
    tokens, columns = x.shape[-2:]
    panel = _check_outputs(x, gram, sum)
    if tile not in (0, 128, 256):
        raise ValueError(f"tile must be 128, 256, or 0 to choose; got {tile}")
    if cluster not in (0, 1, 2) or (cluster == 2 and tile == 128):
        raise ValueError(
            f"cluster must be 1, or 2 with tiles of 256 columns; got {cluster}, {tile}"
        )
    if (reason := unavailable(x.device, x.dtype)) is not None:
        raise BackendError(f"the Hopper Gram kernel cannot run: {reason}")
    if tokens == 0 or columns == 0:
        return
    if panel == 0:
        # no tiles, and the sums are by-products of tiles
        if sum is not None:
            sum.add_(x.sum(0 if planes == 1 else (0, 1), dtype=torch.float64))
        return
    if not readable(x, planes):
        raise ValueError(
            f"x must have unit column stride, rows a multiple of {ALIGNMENT} elements apart, "
            "planes a multiple of rows apart, and a 16-byte aligned start; "
            f"got strides {x.stride()} at {x.data_ptr():#x}: copy it to padded rows"
        )
    row_stride, plane_stride = _strides(x, planes)
    native = _library()
    code = int(getattr(native.Dtype, _extension.DTYPES[x.dtype]))
    shape = (code, planes, tokens, columns, row_stride, plane_stride, panel, tile, blocks, cluster)
    with _stream(x.device) as stream:
        bytes_needed = native.gram_sm90_workspace(*shape)
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=x.device)
        native.gram_sm90(
            *shape,
            x.data_ptr(),
            gram.data_ptr(),
            gram.stride(0),
            0 if sum is None else sum.data_ptr(),
            workspace.data_ptr(),
            bytes_needed,
            period,
            stream,
        )


def _check_outputs(x: Tensor, gram: Tensor, sum: Tensor | None) -> int:
    """The panel's columns."""
    columns = x.shape[-1]
    if gram.ndim != 2 or gram.shape[0] != columns or gram.shape[1] > columns:
        raise ValueError(
            f"gram must be ({columns}, s) with s ≤ {columns}; got shape {tuple(gram.shape)}"
        )
    if gram.dtype != torch.float32 or gram.device != x.device:
        raise ValueError(f"gram must be float32 on {x.device}; got {gram.dtype} on {gram.device}")
    if gram.shape[1] > 1 and gram.stride(1) != 1:
        raise ValueError(f"gram must have unit column stride; got strides {gram.stride()}")
    if sum is not None and (
        tuple(sum.shape) != (columns,)
        or sum.dtype != torch.float64
        or sum.device != x.device
        or not sum.is_contiguous()
    ):
        raise ValueError(
            f"sum must be ({columns},) contiguous float64 on {x.device}; "
            f"got {tuple(sum.shape)} {sum.dtype} on {sum.device}"
        )
    return gram.shape[1]


def _strides(x: Tensor, planes: int) -> tuple[int, int]:
    """Row and plane stride in elements; those of a single row or plane say nothing."""
    tokens, columns = x.shape[-2:]
    plane = x.stride(0) if planes > 1 else 0
    row = x.stride(-2) if tokens > 1 else plane or -(-columns // ALIGNMENT) * ALIGNMENT
    return row, plane

"""Float32 products in float32, whatever the process allows its models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# data-centre parts of today whose float64 rate is half of float32 or better
FULL_RATE_FLOAT64 = ((8, 0), (9, 0), (10, 0))


def slow_float64(device: torch.device) -> bool:
    """Whether float64 products take much longer than float32 ones on `device`: most GPUs.

    On a CPU they take twice as long, on data-centre GPUs as long or less: 62.5 against 50.6
    TFLOP/s on an H200, whose tensor cores multiply float64 and not float32.
    """
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) not in FULL_RATE_FLOAT64


def no_autocast(device: torch.device) -> torch.autocast:
    """An op means its dtypes: autocast would run float32 products in 16 bits."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: a process that allows TF32 or bfloat16 ones loses 1e-3 here.

    Read per backend: the older, global getter raises once the newer settings were used.
    """
    backend: Any = torch.backends  # mkldnn.matmul is not in torch's own type hints
    places = (backend.cuda.matmul, backend.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    if all(value in ("none", "ieee") for value in before):
        yield
        return
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value

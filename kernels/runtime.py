"""What the kernels need to know of the machine: interpreter or GPU, capability, processors."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
import triton

# read when triton decorates a kernel, so at the import of the modules that do; changing the
# variable later has no effect on them
INTERPRET: bool = triton.knobs.runtime.interpret

# programs of a persistent grid under the interpreter: few, so that each one takes several tiles
INTERPRETED_PROGRAMS = 3


def interprets(device: torch.device) -> bool:
    """True where kernels on this device are interpreted in Python instead of compiled."""
    return INTERPRET or device.type != "cuda"


@lru_cache
def capability(device: torch.device) -> int:
    """90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one for each multiprocessor.

    One, not more: 256 threads with two 128² float32 accumulators take more than half the registers.
    """
    return INTERPRETED_PROGRAMS if interprets(device) else _processors(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""Where a CUDA kernel runs: the emulator, on CPU tensors, and the device where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import liar_cuda_host
import pytest
import torch

from liar_ext.ops import _extension, _native_solve


@dataclass(frozen=True)
class Place:
    """`emulated` is None on a device."""

    device: torch.device
    emulated: object | None

    def __call__(self, tensor):
        return None if tensor is None else tensor.to(self.device)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """The same test in the emulator and on a GPU, with fresh outputs poisoned in both."""
    if request.param == "emulated":
        if (reason := liar_cuda_host.unavailable()) is not None:
            pytest.skip(reason)
        import liar_solve_host

        yield Place(torch.device("cpu"), liar_solve_host.install(monkeypatch))
        return
    device = torch.device("cuda", torch.cuda.current_device())
    reason = _native_solve.unavailable(device)
    if reason is not None:
        if _extension.cuda_info() is None:
            pytest.skip(reason)
        pytest.fail(f"there is a GPU, and the solve kernels do not run on it: {reason}")
    # fills what torch.empty returns with NaN; cuBLAS may only warn about its own order of sums
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield Place(device, None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(monkeypatch):
    """The emulator alone, for what only it can show."""
    if (reason := liar_cuda_host.unavailable()) is not None:
        pytest.skip(reason)
    import liar_solve_host

    return liar_solve_host.install(monkeypatch)

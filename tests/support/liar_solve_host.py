"""The CUDA solve kernels on CPU tensors: `_native_solve` with the emulator behind it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import liar_cuda_host
import pytest

from liar_ext.ops import _native_solve

SOURCES = ("csrc/cuda/solve_small.cu", "csrc/cuda/solve_panel.cu")
P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _fields(text: str) -> list[tuple[str, type]]:
    kinds = {"p": P, "i": I32, "l": I64}
    return [(name, kinds[kind]) for kind, name in (word.split(":") for word in text.split())]


class LiarSolveSmall(ctypes.Structure):
    """As in csrc/liar.h; the bindings take the same values in the same order."""

    _fields_ = _fields(
        "p:matrix l:matrix_batch l:matrix_row p:right l:right_batch l:right_row p:strength "
        "p:mean_kept p:mean_dropped p:solution p:shift p:info p:pivot p:largest p:smallest p:error "
        "p:workspace l:batch i:size l:columns i:single p:stream"
    )


class LiarPanel(ctypes.Structure):
    _fields_ = _fields(
        "p:matrix l:matrix_batch l:matrix_row p:inverse l:inverse_batch l:inverse_row p:info "
        "p:pivot l:batch i:size l:first i:single p:stream"
    )


class Emulated:
    """What `_native_solve` finds in the extension, run by the emulator."""

    def __init__(self) -> None:
        self.library = liar_cuda_host.build(SOURCES)
        self.library.liar_solve_small_workspace.argtypes = [I64, I64]
        self.library.liar_solve_small_workspace.restype = I64
        self.library.liar_solve_small_shared.restype = I64

    def solve_small_workspace(self, batch: int, columns: int) -> int:
        return self.library.liar_solve_small_workspace(batch, columns)

    def solve_small_shared(self, size: int, single: int) -> int:
        return self.library.liar_solve_small_shared(size, single)

    def solve_small(self, *values: int) -> None:
        args = LiarSolveSmall(*values)
        cells = args.batch * args.columns
        sizes = {"solution": 8 * cells * args.size, "shift": 8 * cells, "info": 4 * args.batch}
        sizes |= dict.fromkeys(("pivot", "largest", "smallest", "error"), 8 * args.batch)
        sizes["workspace"] = 8 * self.solve_small_workspace(args.batch, args.columns)
        with _guarded(args, sizes):
            self._check(self.library.liar_solve_small(ctypes.byref(args)))

    def solve_panel(self, *values: int) -> None:
        self._check(self.library.liar_solve_panel(ctypes.byref(LiarPanel(*values))))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}: {liar_cuda_host.report(self.library)}")

    def order(self, kind: int, seed: int) -> None:
        self.library.cuda_host_order(kind, seed)

    def device(self, capability: int = 90, shared: int = 232448, processors: int = 4) -> None:
        self.library.cuda_host_device(capability, shared, processors)


@contextlib.contextmanager
def _guarded(args: ctypes.Structure, sizes: dict[str, int]) -> Iterator[None]:
    """Each output in a buffer of NaN bytes with guards on both sides, copied out at the end."""
    guard, buffers = 256, {}
    for name, size in sizes.items():
        buffers[name] = ctypes.create_string_buffer(b"\xff" * (size + 2 * guard))
        target = getattr(args, name)
        setattr(args, name, ctypes.addressof(buffers[name]) + guard)
        buffers[name].target = target
    yield
    for name, size in sizes.items():
        raw = buffers[name].raw
        assert raw[:guard] == b"\xff" * guard, f"a write before {name}"
        assert raw[guard + size : size + 2 * guard] == b"\xff" * guard, f"a write after {name}"
        if size:
            ctypes.memmove(buffers[name].target, raw[guard : guard + size], size)


def install(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """`_native_solve` runs on CPU tensors for the rest of the test."""
    emulated = Emulated()
    emulated.order(0, 0)
    emulated.device()
    monkeypatch.setattr(_native_solve, "_library", lambda: emulated)
    monkeypatch.setattr(_native_solve, "unavailable", lambda *_: None)
    monkeypatch.setattr(_native_solve, "_stream", lambda device: contextlib.nullcontext(0))
    return emulated

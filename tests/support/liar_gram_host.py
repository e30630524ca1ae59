"""The Hopper Gram kernel on CPU tensors: `_native_gram` with the emulator behind it."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import liar_cuda_host
import pytest

from liar_ext.ops import _native_gram

SOURCES = ("csrc/cuda/gram_sm90.cu",)
P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class LiarGramSm90(ctypes.Structure):
    """As in csrc/liar.h."""

    _fields_ = (
        ("x", P),
        ("dtype", I32),
        ("planes", I32),
        ("tokens", I64),
        ("columns", I64),
        ("row_stride", I64),
        ("plane_stride", I64),
        ("gram", P),
        ("gram_stride", I64),
        ("panel", I64),
        ("sum", P),
        ("workspace", P),
        ("workspace_bytes", I64),
        ("tile", I32),
        ("period", I32),
        ("blocks", I32),
        ("cluster", I32),
        ("stream", P),
    )


SHAPE = ("dtype", "planes", "tokens", "columns", "row_stride", "plane_stride", "panel", "tile")
SHAPE = (*SHAPE, "blocks", "cluster")
POINTERS = ("x", "gram", "gram_stride", "sum", "workspace", "workspace_bytes", "period", "stream")


class Emulated:
    """What `_native_gram` finds in the extension, run by the emulator."""

    Dtype = SimpleNamespace(float32=0, float16=1, bfloat16=2)

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = library or liar_cuda_host.build(SOURCES)

    def gram_sm90_workspace(self, *values: int) -> int:
        needed = I64()
        args = LiarGramSm90(**dict(zip(SHAPE, values, strict=True)))
        self._check(self.library.liar_gram_sm90_workspace(ctypes.byref(args), ctypes.byref(needed)))
        return needed.value

    def gram_sm90(self, *values: int) -> None:
        args = LiarGramSm90(**dict(zip((*SHAPE, *POINTERS), values, strict=True)))
        self._check(self.library.liar_gram_sm90(ctypes.byref(args)))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}: {liar_cuda_host.report(self.library)}")

    def order(self, kind: int, seed: int) -> None:
        self.library.cuda_host_order(kind, seed)

    def device(self, capability: int = 90, shared: int = 232448, processors: int = 4) -> None:
        self.library.cuda_host_device(capability, shared, processors)


def install(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL | None = None) -> Emulated:
    """`_native_gram` runs on CPU tensors for the rest of the test, by `library` if given."""
    emulated = Emulated(library)
    emulated.order(0, 0)
    emulated.device()
    monkeypatch.setattr(_native_gram, "_library", lambda: emulated)
    monkeypatch.setattr(_native_gram, "unavailable", lambda *_: None)
    monkeypatch.setattr(_native_gram, "_stream", lambda device: contextlib.nullcontext(0))
    return emulated

"""Build CUDA sources for the host emulator in `cuda_host/` and drive it from Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "cuda_host"
# forward, reverse and three shuffles with interruptions: (order, seed) of cuda_host_order
ORDERS = ((0, 0), (1, 0), (2, 1), (2, 2), (2, 3))
FLAGS = (
    *("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fPIC", "-shared", "-pthread", "-Wall", "-Wno-unknown-pragmas"),
    # each library has its own emulator, whatever else this process has loaded
    *("-fno-gnu-unique", "-Wl,-Bsymbolic"),
)


def unavailable() -> str | None:
    """Why nothing can be built here, or None."""
    if os.uname().sysname != "Linux":
        return "the CUDA emulator needs Linux"
    return None if shutil.which("g++") else "no g++ on PATH"


@functools.cache
def build(sources: tuple[str, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The emulated library of some `.cu` files, compiled once for each content.

    Args:
        sources: paths relative to the repository root, or absolute.
        flags: further compiler flags, for example `("-DNAME",)`.
    Raises:
        RuntimeError: the compiler's message.
    """
    files = [ROOT / source for source in sources]
    seen = [*files, *sorted((ROOT / "csrc").rglob("*.*h")), *sorted(EMULATOR.glob("*"))]
    digest = hashlib.sha256(repr((FLAGS, flags, sources, os.uname().nodename)).encode())
    for file in seen:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only checkout
        folder = Path(tempfile.mkdtemp(prefix="liar-cuda-host-"))
    library = folder / f"{files[0].stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        inputs = [str(part) for file in files for part in ("-x", "c++", file)]
        command = ["g++", *FLAGS, *flags, "-I", str(EMULATOR), *inputs, "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        # renamed when complete: another test process may be building the same
        partial.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.cuda_host_report.restype = ctypes.c_char_p
    loaded.cuda_host_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return loaded


def report(library: ctypes.CDLL) -> str:
    """Why the last emulated launch failed, or an empty string."""
    return library.cuda_host_report().decode()

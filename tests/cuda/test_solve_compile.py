"""What nvcc makes of the solve kernels: no spills and no local stack on any architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from liar_setup import load_setup

ROOT = Path(__file__).resolve().parents[2]
FILES = ("csrc/cuda/solve_small.cu", "csrc/cuda/solve_panel.cu")
KERNELS = {"solve_small": 6, "solve_panel": 3}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


setup = load_setup()
pytestmark = pytest.mark.skipif(
    setup.nvcc_obstacle() is not None, reason=str(setup.nvcc_obstacle())
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_no_kernel_spills_or_uses_local_memory(file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas -v")
    (target,) = setup.compile_cuda([file], tmp_path)
    log = capfd.readouterr().err
    assert "warning" not in log, log
    entries = [match.groupdict() for match in ENTRY.finditer(log)]
    found = sorted(entry["arch"] for entry in entries)
    assert found == sorted(
        f"sm_{a}" for a in setup.CUDA_ARCHS for _ in range(KERNELS[Path(file).stem])
    )
    for entry in entries:
        assert entry["stack"] == entry["stores"] == entry["loads"] == "0", entry
        # all shared memory is dynamic: its size is checked against the device at the launch
        assert "smem" not in entry["rest"], entry
    content = Path(target).read_bytes()
    for arch in setup.CUDA_ARCHS:
        assert f"sm_{arch}".encode() in content

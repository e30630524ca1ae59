"""The Triton Gram kernel: its tile list, its configs, and what it compiles to without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from liar_ext.kernels import gram

AOT = Path(__file__).resolve().parents[1] / "support" / "liar_aot.py"
# bytes of shared memory that one block may have: A100 163 KiB, H100 227 KiB
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@triton.jit
def tile_list(out_ptr, panel_tiles):
    row, column = gram._tile_of(tl.program_id(0), panel_tiles)
    tl.store(out_ptr + 2 * tl.program_id(0), row)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, column)


@pytest.mark.skipif(not gram.INTERPRET, reason="runs a kernel on CPU tensors")
@pytest.mark.parametrize(("row_tiles", "panel_tiles"), [(1, 1), (6, 6), (7, 3), (5, 1)])
def test_the_tile_list_is_the_triangle_then_the_rectangle(row_tiles, panel_tiles):
    triangle = [(i, j) for i in range(panel_tiles) for j in range(i + 1)]
    rectangle = [(i, j) for i in range(panel_tiles, row_tiles) for j in range(panel_tiles)]
    expected = torch.tensor(triangle + rectangle, dtype=torch.int32)
    found = torch.full_like(expected, -1)
    tile_list[(len(expected),)](found, panel_tiles)
    assert torch.equal(found, expected)


def test_large_tile_indices_are_exact():
    """The float32 square root with its two corrections, for 1024 rows of tiles (n = 131072)."""
    rows = torch.arange(1024, dtype=torch.int64)
    for index, expected in (
        (rows * (rows + 1) // 2, rows),
        (rows * (rows + 1) // 2 + rows, rows),
    ):
        row = ((torch.sqrt(8.0 * index.float() + 1.0) - 1.0) * 0.5).to(torch.int64)
        row = torch.where(row * (row + 1) // 2 > index, row - 1, row)
        row = torch.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
        assert torch.equal(row, expected)


@pytest.mark.parametrize(
    ("capability", "config"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 90)]
)
def test_a_gpu_takes_the_newest_config_that_it_can_run(capability, config):
    expected = gram.CONFIGS[config][torch.bfloat16]
    assert gram.config_for(torch.bfloat16, capability) == expected


def test_an_old_gpu_and_a_strange_dtype_are_refused():
    with pytest.raises(ValueError, match=r"capability 7\.5.*8\.0 or newer.*LIAR_BACKEND=torch"):
        gram.config_for(torch.float32, 75)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        gram.config_for(torch.float64, 90)


@pytest.mark.parametrize("arch", sorted(gram.CONFIGS))
def test_every_config_compiles_without_spilling(arch, tmp_path):
    """A compile gate, not a speed one: registers, shared memory, pipelining and tensor cores."""
    done = subprocess.run(
        [sys.executable, "-P", str(AOT), str(arch)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(gram.CONFIGS[arch]) + 3
    for row in rows:
        assert row["spill"] == 0, row
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED[arch], row
        if row["kernel"] == "gram":
            assert row["async_copies"] > 0, row
            assert (row["tensor_core"] > 0) == (row["dtype"] != "fp32"), row

"""What every configuration compiles to, without a GPU: registers, shared memory, instructions.

Those that are committed; with `--slow` the candidates of `liar bench gram --tune` as well.

A compile gate and not a measurement: it fails on a spill, on more shared memory than a block has,
on operands that leave the asynchronous copies, and on a lost second accumulator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from liar_ext.kernels import tune
from liar_ext.kernels.config import DTYPES, KERNELS, ProductConfig, tables

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "liar_aot.py"

ARCHITECTURES = (80, 90, 100)
# bytes of shared memory that one block may have: A100 163 KiB, H100 and B200 227 KiB
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    """`compiled(arch)`: one process for each architecture, once."""
    found: dict[int, list[dict]] = {}
    cache = str(tmp_path_factory.mktemp("triton"))
    more = ["--candidates"] if request.config.getoption("--slow") else []

    def rows(arch: int) -> list[dict]:
        if arch not in found:
            done = subprocess.run(
                [sys.executable, "-P", str(SCRIPT), str(arch), *more],
                env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            found[arch] = [json.loads(line) for line in done.stdout.splitlines()]
        return found[arch]

    return rows


def products(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kernel"] in KERNELS]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_was_compiled(compiled, arch, request):
    """Each committed one and, with `--slow`, each candidate, for its dtype."""
    built = {
        (row["kernel"], row["dtype"], ProductConfig(**row["config"]))
        for row in products(compiled(arch))
    }
    due = {
        (entry.kernel, entry.dtype, entry.config)
        for table in tables()
        if table.architecture == arch
        for entry in table.entries
    }
    for kernel in KERNELS if request.config.getoption("--slow") else ():
        for dtype in DTYPES:
            due |= {(kernel, dtype, config) for config in tune.candidates(kernel, dtype, arch)}
    assert due <= built
    assert {"sums", "pack", "planes", "cosine"} < {row["kernel"] for row in compiled(arch)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(compiled, arch):
    for row in compiled(arch):
        assert (row["spill"], row["stack"], row["serialised"]) == (0, 0, False), row
        assert row["shared"] <= SHARED[arch], row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_use_tensor_cores_and_asynchronous_copies(compiled, arch):
    for row in products(compiled(arch)):
        assert row[INSTRUCTION[arch]] > 0, row
        copies = row["tensor_copies"] if row["kernel"] == "descriptor" else row["copies"]
        # each operand of each plane, in the prologue of the pipeline and in its loop; bytes of one
        # step, at 16 for each of the threads and a whole block for a tensor copy
        config = ProductConfig(**row["config"])
        operands = (6 if row["dtype"] == "float32" else 2) * config.stages
        if row["kernel"] == "pointer":
            operands *= config.block * config.block_t * 2 // (16 * 32 * config.warps)
        assert copies >= operands, row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_of_tensor_cores_are_promoted(compiled, arch):
    """Float32 additions outside the tensor core: to G, on the diagonal and off it; of a flush; and
    of the last one, where several steps are one. Folded into the tensor core's sum, or left out,
    those of a flush would not be there. (For sm_100 the compiler adds once more.)
    """
    for row in products(compiled(arch)):
        config = ProductConfig(**row["config"])
        per_thread = config.block**2 // (32 * config.warps)
        times = (3 if config.flush == 1 else 4) + (arch == 100)
        assert row["additions"] >= per_thread * times, row


def cosines(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kernel"] == "cosine"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_cosines_are_read_in_the_widest_pieces(compiled, arch):
    """x and y once in the ordinary pass and once in that of rows out of range, 16 bytes a thread;
    beside them only the index of a row. Nothing is added up through memory."""
    for row in cosines(compiled(arch)):
        assert row["atomics"] == 0, row
        if row["aligned"]:
            assert (row["wide_loads"], row["loads"]) == (4, 4 + row["valid"]), row
            # a word for each warp, to ask whether any has to read again; sums never leave theirs
            assert row["shared"] <= 4 * row["warps"], row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cosines_keep_subnormal_numbers(compiled, arch):
    """The factor of rows that are too small is for numbers that a flush would have made zero."""
    for row in cosines(compiled(arch)):
        assert not row["flushes_subnormals"], row


def test_on_hopper_enough_of_the_rows_is_on_its_way(compiled):
    """Bytes that the warps of a multiprocessor wait for, over what an H200 moves meanwhile.

    By its data sheet 4.8 TB/s over 132 multiprocessors; a load that misses takes about 0.7 µs.
    """
    for row in cosines(compiled(90)):
        if row["aligned"]:
            registers = row["warps"] * 32 * (-(-row["registers"] // 8) * 8)
            blocks = min(65536 // registers, 2048 // (32 * row["warps"]))
            waiting = blocks * row["warps"] * 2 * 512
            assert waiting >= 1.5 * 4.8e12 * 0.7e-6 / 132, row


def test_on_hopper_products_of_consecutive_steps_overlap(compiled):
    """Where several steps go into one flush, a step waits for the product before the last."""
    for row in products(compiled(90)):
        if row["config"]["flush"] > 1:
            assert row["overlaps"], row


def test_on_hopper_the_column_sums_fit_beside_the_product(compiled):
    """Two programs of the sums and one of a product without packing, on one multiprocessor.

    Four partitions of 16384 registers hold the warps, a warp takes a multiple of 8 for each of its
    32 threads; a block takes 1 KiB of the 228 of shared memory for itself.
    """
    (sums,) = (row for row in compiled(90) if row["kernel"] == "sums")

    def registers(row: dict, warps: int) -> int:
        return warps // 4 * 32 * (-(-row["registers"] // 8) * 8)

    for row in products(compiled(90)):
        if row["dtype"] != "float32":
            used = registers(row, row["config"]["warps"]) + 2 * registers(sums, sums["warps"])
            assert used <= 16384, row
            shared = row["shared"] + 1024 + 2 * (sums["shared"] + 1024)
            assert shared <= 228 * 1024, row

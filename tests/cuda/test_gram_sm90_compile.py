"""What the Hopper Gram kernel compiles to, and whether Triton describes its tiles the same way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from liar_setup import load_setup

ROOT = Path(__file__).resolve().parents[2]
AOT = ROOT / "tests" / "support" / "liar_aot_descriptor.py"
# bytes of shared memory that one block may have on an H100 or H200
SHARED = 227 * 1024
# (element 0 bf16 or 1 f16, planes) by (tile columns, blocks of a cluster)
KERNELS = [
    (element, tile, planes, cluster)
    for element, planes in ((0, 1), (1, 1), (0, 3))
    for tile, cluster in ((128, 1), (256, 1), (256, 2))
]


def cuobjdump() -> Path | None:
    spec = importlib.util.find_spec("triton")
    found = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found and found.exists() else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(object, log of ptxas by architecture and kernel)"""
    setup = load_setup()
    if (reason := setup.nvcc_obstacle()) is not None:
        pytest.skip(reason)
    target = tmp_path_factory.mktemp("gram") / "gram_sm90.o"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    source = ROOT / "csrc" / "cuda" / "gram_sm90.cu"
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
    command = [str(setup.cuda_home() / "bin" / "nvcc"), *flags, *archs, "-c", str(source), "-o"]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = {}
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        logs[arch, name] = part
    return target, done.stderr, logs


def kernel_name(names, element: int, tile: int, planes: int, cluster: int) -> str:
    wanted = f"gram_kernelILNS_6hopper7ElementE{element}ELi{tile}ELi{planes}ELi{cluster}E"
    (found,) = [name for name in names if wanted in name]
    return found


def test_nothing_spills_and_nothing_is_serialised(compiled):
    _, everything, logs = compiled
    assert Counter(arch for arch, _ in logs) == {"sm_80": 11, "sm_90a": 11}
    for key, log in logs.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, key
    # C7508: setmaxnreg ignored; C7510: wgmma serialised
    assert not re.search(r"C75\d\d|warning", everything), everything


def test_a_block_starts_with_the_registers_that_it_moves(compiled):
    """gram_shape.cuh counts on 168 for each of 384 threads: with fewer, setmaxnreg would hang."""
    _, _, logs = compiled
    names = [name for arch, name in logs if arch == "sm_90a"]
    for kernel in KERNELS:
        log = logs["sm_90a", kernel_name(names, *kernel)]
        assert int(re.search(r"Used (\d+) registers", log).group(1)) == 168


def test_the_machine_code_is_hoppers(compiled):
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with triton")
    command = [str(cuobjdump()), "-sass", "-arch", "sm_90a", str(compiled[0])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = {f.split()[0]: f for f in sass.split("Function : ")[1:]}
    for element, tile, planes, cluster in KERNELS:
        code = functions[kernel_name(functions, element, tile, planes, cluster)]
        # stages of 64 tokens are 4 wgmmas, of 32 tokens and six products 12; both transposed
        steps = 4 if planes == 1 else 12
        kind = "F32.BF16" if element == 0 else "F32"
        pattern = rf"HGMMA\.64x{tile}x16\.{kind} R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB, R\d+"
        assert len(re.findall(pattern, code)) == code.count("HGMMA") == steps
        # one WARPGROUP.ARRIVE: nothing was put between the wgmmas of a stage
        assert code.count("WARPGROUP.ARRIVE") == 1
        assert code.count("UTMALDG.3D") >= 128 // 64 + tile // cluster // 64
        assert ("UTMALDG.3D.MULTICAST" in code) == (cluster == 2)
        assert code.count("USETMAXREG") == 2
        # at the two meetings of a cluster, and never in a loop
        assert code.count("MEMBAR.ALL.GPU") <= 2 * (cluster - 1)
        assert not re.search(r"\b(LDL|STL)\b", code)
        assert "REDG.E.ADD.F32x2" in code


def test_shared_memory_fits_a_block(compiled):
    """The ring, its barriers and the slack for alignment, as Shape counts them."""
    for tile in (128, 256):
        for planes in (1, 3):
            depth = 64 if planes == 1 else 32
            stage = planes * depth * (128 + tile) * 2
            stages = 216 * 1024 // stage
            assert stages >= 3
            assert stages * stage + 1024 + 16 * stages <= SHARED


@pytest.mark.parametrize(("tile", "depth"), [(128, 64), (256, 64), (256, 32)])
def test_triton_describes_the_same_tiles_in_the_same_way(tile, depth, tmp_path):
    """`dot(trans(a), b)` on tiles of a tensor copy: its constants, against hopper::descriptor."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-P", str(AOT), str(tile), str(depth)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # hopper::descriptor: 128-byte swizzle, 8 rows of 128 bytes, chunks of `depth` rows
    assert found["swizzle"] == 1
    assert found["stride"] * 16 == 8 * 128
    assert found["leading"] * 16 == depth * 128
    # hopper::descriptor_offset(16 tokens · 128 bytes)
    assert [step * 16 for step in found["steps"]] == [16 * 128 * i for i in range(depth // 16)]
    # accumulate, both signs plus, both operands transposed, and so many steps
    assert found["immediates"] == ["1, 1, 1, 1"] * (depth // 16)
    assert found["tensor_map_swizzle"] == 3, "CU_TENSOR_MAP_SWIZZLE_128B"
    assert found["box"] == [depth, 64]

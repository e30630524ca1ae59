"""Every kernel once on small, odd sizes: what compute-sanitizer can watch in a minute.

`benchmarks/gpu.sh` runs this file under memcheck and racecheck; without them it is a smoke test.
What is expected is computed on the CPU: the libraries' kernels take long to watch.
"""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.bench.gram_variants import KERNELS, SETTINGS, Variant
from liar_ext.bench.solve_systems import systems
from liar_ext.ops import (
    _native_gram,
    backends,
    gram_reference,
    row_cosines,
    row_cosines_reference,
    solve,
)
from liar_ext.ops.moments import Moments

CPU = torch.device("cpu")
GRAM = [Variant("cuda"), *(Variant("triton", kernel) for kernel in KERNELS)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# products of 16-bit values are exact in float32; float32 ones are split into three bfloat16
BOUND = 1e-5


@pytest.fixture(autouse=True)
def no_self_tests(monkeypatch):
    """They would only repeat this file, against products of the libraries."""
    monkeypatch.setattr(backends, "_failed_self_test", lambda *_: None)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "mask and keep"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", GRAM, ids=lambda variant: variant.name)
def test_gram(variant, dtype, masked):
    device = torch.device("cuda")
    if reason := backends.obstacle("gram", variant.backend, device, dtype):
        pytest.skip(f"{variant.name}: {reason}")
    if variant.kernel == "descriptor" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    x = torch.randn(70, 136).to(dtype)
    mask = torch.arange(70) % 3 > 0 if masked else None
    keep = torch.arange(1, 136, 2) if masked else None
    there = (None if value is None else value.to(device) for value in (mask, keep))
    check(variant, x.to(device), gram_reference(x, mask, keep), *there)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_settings_of_the_hopper_kernel(setting, dtype):
    device = torch.device("cuda")
    if reason := _native_gram.unavailable(device, dtype):
        pytest.skip(reason)
    # tiles with an edge, a whole period of 12 stages and part of a stage
    x = torch.randn(830, 264).to(dtype)
    check(Variant("cuda", setting=setting), x.to(device), gram_reference(x))


def check(variant, x, expected, mask=None, keep=None):
    moments = variant.accumulate(x, mask, Moments.zeros(x.shape[1], device=x.device, keep=keep))
    assert_close_rms(moments.gram.cpu().tril(), expected.gram.tril(), BOUND)
    assert_close_rms(moments.sum.cpu(), expected.sum, BOUND)
    assert int(moments.count) == int(expected.count)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [136, 601])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cosines(backend, dtype, columns):
    device = torch.device("cuda")
    if reason := backends.obstacle("cosine", "triton", device, dtype):
        pytest.skip(reason)
    backend("triton")
    x, y = (torch.randn(70, columns).to(dtype) for _ in range(2))
    # rows that are read again
    x[5::9] *= torch.finfo(dtype).max / 1e3
    valid = torch.arange(69, -1, -2)
    expected = row_cosines_reference(x, y, valid)
    found = row_cosines(x.to(device), y.to(device), valid.to(device))
    assert float((found.cpu() - expected).abs().max()) <= BOUND
    # what is no row is not read
    assert bool(row_cosines(x.to(device), y.to(device), valid.to(device) + 70).isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(3, 33, 5), (2, 128, 40), (2, 200, 9)], ids=str)
@pytest.mark.parametrize("name", ["cuda", "torch"])
def test_solve(backend, name, shape, precision):
    device = torch.device("cuda")
    working = getattr(torch, precision)
    if reason := backends.obstacle("solve", name, device, working):
        pytest.skip(f"{name}: {reason}")
    backend(name)
    system = systems(*shape, CPU)
    there = (system.matrix.to(device), system.right.to(device))
    solved = solve(*there, system.ridge, precision=precision)
    assert system.forward_error(solved.solution.cpu()) < 1e-6

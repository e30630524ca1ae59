"""Every kernel once on small, odd sizes: what compute-sanitizer can watch in a minute.

`benchmarks/gpu.sh` runs this file under memcheck and racecheck; without them it is a smoke test.
"""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.bench.gram_variants import KERNELS, Variant
from liar_ext.bench.solve_systems import systems
from liar_ext.ops import backends, gram_reference, solve
from liar_ext.ops.moments import Moments

GRAM = [Variant("cuda"), *(Variant("triton", kernel) for kernel in KERNELS)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# products of 16-bit values are exact in float32; float32 ones are split into three bfloat16
BOUND = 1e-5


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
    x = torch.randn(70, 136).to(device=device, dtype=dtype)
    mask = torch.arange(70, device=device) % 3 > 0 if masked else None
    keep = torch.arange(1, 136, 2, device=device) if masked else None
    out = Moments.zeros(136, device=device, keep=keep)
    moments = variant.accumulate(x, mask, out)
    expected = gram_reference(x, mask, keep)
    assert_close_rms(moments.gram.tril(), expected.gram.tril(), BOUND)
    assert_close_rms(moments.sum, expected.sum, BOUND)


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
    system = systems(*shape, device)
    solved = solve(system.matrix, system.right, system.ridge, precision=precision)
    assert system.forward_error(solved.solution) < 1e-6

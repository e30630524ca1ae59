"""Cross moments by both product kernels against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

pytest.importorskip("triton")

from liar_ext.kernels.config import KERNELS
from liar_ext.kernels.cross import accumulate_cross
from liar_ext.kernels.runtime import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs kernels on CPU tensors")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = [(0, 3, 5), (1, 1, 1), (17, 65, 7), (130, 64, 144), (70, 16, 130)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(("tokens", "n", "m"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_matches_the_definition_and_writes_nothing_else(dtype, tokens, n, m, masked, kernel):
    x, y = (torch.randn(tokens, n) + 0.5).to(dtype), (torch.randn(tokens, m) - 0.2).to(dtype)
    mask = torch.rand(tokens) > 0.4 if masked else None
    read = slice(None) if mask is None else mask
    left, right = x[read].double(), y[read].double()
    if mask is not None:
        x[~mask], y[~mask] = torch.nan, torch.inf
    around = torch.full((n + 2, m + 2), torch.nan)
    cross = around[1:-1, 1:-1]
    cross.fill_(0.25)
    sums = [torch.ones(columns, dtype=torch.float64) for columns in (n, m)]
    accumulate_cross(x, y, mask, cross, *sums, kernel=kernel)
    assert_close_rms(cross, left.T @ right + 0.25, 2.0**-24 * (3 + tokens**0.5))
    assert_close_rms(sums[0], 1 + left.sum(0), 1e-14)
    assert_close_rms(sums[1], 1 + right.sum(0), 1e-14)
    cross.fill_(torch.nan)
    assert bool(around.isnan().all())


def test_what_does_not_fit_together_is_refused():
    x, cross = torch.zeros(3, 2), torch.zeros(2, 4)
    sums = [torch.zeros(n, dtype=torch.float64) for n in (2, 4)]
    with pytest.raises(ValueError, match=r"same tokens.*\(3, 2\).*\(2, 4\)"):
        accumulate_cross(x, torch.zeros(2, 4), None, cross, *sums)
    with pytest.raises(ValueError, match=r"cross must be \(2, 5\); got \(2, 4\)"):
        accumulate_cross(x, torch.zeros(3, 5), None, cross, *sums)

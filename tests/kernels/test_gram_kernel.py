"""Gram matrices by both product kernels against the float64 definition, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

pytest.importorskip("triton")

from liar_ext.errors import BackendError
from liar_ext.kernels import gram_descriptor, products
from liar_ext.kernels.config import KERNELS, ProductConfig
from liar_ext.kernels.gram import accumulate
from liar_ext.kernels.runtime import INTERPRET
from liar_ext.ops import Moments, gram_reference

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs kernels on CPU tensors")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# columns that are a multiple of 16 are read in place, the others packed; every T, n, mask and
# panel with every dtype and kernel, not their product: a case takes 0.1 to 0.6 s
CASES = [
    # tokens, columns, mask, kept
    (0, 7, "unmasked", None),
    (1, 1, "unmasked", None),
    (17, 7, "masked", 3),
    (300, 65, "all-valid", None),
    (17, 208, "unmasked", None),
    (130, 64, "masked", None),
    (17, 130, "nothing-valid", 129),
    (130, 144, "masked", 65),
    (70, 65, "unmasked", 1),
]


def mask_of(kind: str, tokens: int):
    if kind == "unmasked":
        return None
    if kind == "masked":
        return torch.rand(tokens) > 0.3
    return torch.full((tokens,), kind == "all-valid")


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """`x` in the middle of NaN, its rows 32 bytes aligned where those of `x` are."""
    tokens, columns = x.shape
    around = torch.full((tokens + 8, -(-columns // 16) * 16 + 32), torch.nan, dtype=x.dtype)
    inner = around[4 : 4 + tokens, 16 : 16 + columns]
    inner.copy_(x)
    return inner


def check(x, mask, keep, kernel, ratio, **options):
    """Accumulate twice into Moments that are not empty; NaN wherever nothing may be written."""
    columns = x.shape[1]
    order = Moments.zeros(columns, keep=keep).order
    panel = columns if keep is None else keep.numel()
    around = torch.full((columns + 2, panel + 3), torch.nan)
    owned = torch.zeros_like(around, dtype=torch.bool)
    gram = around[1 : 1 + columns, 2 : 2 + panel]
    inside = torch.ones(columns, panel, dtype=torch.bool).tril()
    owned[1 : 1 + columns, 2 : 2 + panel] = inside
    start = torch.randn(columns, panel)
    gram[inside] = start[inside]
    sums = torch.full((columns,), 2.0, dtype=torch.float64)
    valid = x
    if mask is not None:
        valid = x.clone()
        valid[~mask] = torch.nan
    for _ in range(2):
        accumulate(surrounded(valid), mask, order, gram, sums, kernel=kernel, **options)
    assert bool(around[~owned].isnan().all())
    expected = gram_reference(x, mask, keep)
    true = (2 * expected.gram + start.double())[inside]
    assert_close_rms(gram[inside], true, ratio)
    assert_close_rms(sums, 2 + 2 * expected.sum, 1e-14)


def rounding(tokens: int, dtype: torch.dtype) -> float:
    """As in tests/ops/test_gram.py: products of 16-bit values are exact.

    Those of planes lack two of 2^-8 by 2^-16 here, where the interpreter cuts off instead of
    rounding and both have the sign of x; on a GPU it is a quarter, and of either sign.
    """
    return 2.0**-24 * (3 + tokens**0.5) + (2.0**-22 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("tokens", "columns", "mask", "kept"), CASES)
def test_matches_the_definition_and_writes_nothing_else(tokens, columns, mask, kept, dtype, kernel):
    x = (torch.randn(tokens, columns) + 0.5).to(dtype)
    keep = None if kept is None else torch.randperm(columns)[:kept]
    check(x, mask_of(mask, tokens), keep, kernel, rounding(tokens, dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("flush", [1, 2, 3])
def test_any_flush_and_block(flush, dtype, kernel):
    """Tokens that are no multiple of a flush, with as many bands as rows of tiles."""
    config = ProductConfig(block=32, block_t=32, warps=4, stages=1, flush=flush, group=1)
    x = (torch.randn(100, 48) + 0.5).to(dtype)
    check(x, None, None, kernel, rounding(100, dtype), config=config)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_tiles(kernel):
    config = ProductConfig(block=128, block_t=64, warps=8, stages=1, flush=2)
    check(
        torch.randn(100, 200).bfloat16(),
        None,
        None,
        kernel,
        rounding(100, torch.bfloat16),
        config=config,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_are_cut_into_launches(monkeypatch, kernel, dtype):
    monkeypatch.setattr(products, "TOKENS", 128)
    launches = []
    launch = products.launch
    monkeypatch.setattr(products, "launch", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    mask = torch.rand(300) > 0.5
    check(torch.randn(300, 48).to(dtype), mask, None, kernel, rounding(300, dtype))
    assert len(launches) == 2 * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_planes_give_float32_products(kernel):
    """Columns of scales from 1e-6 to 1e6, each entry against its own size: TF32 would err by 1e-4,
    two planes by 1e-5."""
    x = torch.randn(300, 65) * torch.logspace(-6, 6, 65)
    out = Moments.zeros(65)
    accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
    norms = x.double().norm(dim=0)
    error = (out.gram.double() - x.double().T @ x.double()) / (norms[:, None] * norms)
    assert float(error.tril().abs().max()) < 3e-7


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_every_time(kernel):
    x = torch.randn(130, 96).bfloat16()
    results = []
    for _ in range(2):
        out = Moments.zeros(96)
        accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
        results.append(out.gram)
    assert torch.equal(results[0], results[1])


def test_a_panel_of_no_columns_has_sums():
    x = torch.randn(40, 7)
    sums = torch.zeros(7, dtype=torch.float64)
    accumulate(x, None, torch.arange(7), torch.empty(7, 0), sums)
    assert_close_rms(sums, x.double().sum(0), 1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_variable_forces_a_kernel(monkeypatch, kernel):
    monkeypatch.setenv(products.VARIABLE, kernel)
    assert products.plan([torch.zeros(3, 16)], False, False).kernel == kernel


def test_a_launch_that_fails_is_an_error_and_no_fallback(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUtensorMap must be aligned to 128B")

    monkeypatch.setattr(gram_descriptor, "launch", fail)
    x, out = torch.zeros(3, 16), Moments.zeros(16)
    with pytest.raises(BackendError, match=r"descriptor.*128B.*LIAR_GRAM_KERNEL=pointer"):
        accumulate(x, None, None, out.gram, out.sum, kernel="descriptor")


def test_the_descriptor_kernel_says_what_it_cannot_read():
    out, config = torch.zeros(16, 16), products.INTERPRETED
    x = torch.zeros(1, 3, 40, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="takes no mask"):
        gram_descriptor.launch(x, x, torch.ones(3, dtype=torch.uint8), out, True, config)
    shifted = x[:, :, 1:17]
    with pytest.raises(ValueError, match="16 bytes; got offset 2"):
        gram_descriptor.launch(shifted, shifted, None, out, True, config)

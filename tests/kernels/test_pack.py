"""Packing: columns, masks, padding and planes, each bit of it; and the sums on the way."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from liar_ext.kernels import pack as packing
from liar_ext.kernels.pack import add_column_sums, column_sums_beside, pack, pack_padded
from liar_ext.kernels.runtime import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs kernels on CPU tensors")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(0, 5), (1, 1), (17, 65), (300, 130)]


@pytest.fixture(autouse=True)
def poisoned():
    """Freshly allocated memory is NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def expected(x, mask, columns):
    packed = x.clone() if columns is None else x[:, columns]
    if mask is not None:
        packed[~mask] = 0
    return packed


@pytest.mark.parametrize("selection", ["all", "some"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(("tokens", "n"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_columns_and_zeroes_masked_rows(dtype, tokens, n, masked, selection):
    x = torch.randn(tokens, n).to(dtype)
    mask = torch.rand(tokens) > 0.4 if masked else None
    columns = torch.randperm(n)[: (n + 2) // 3] if selection == "some" else None
    sums = torch.full((n,), 0.5, dtype=torch.float64)
    packed = pack(x, mask, columns, sum=sums)
    true = expected(x, mask, columns)
    assert torch.equal(packed, true)
    assert packed.dtype == dtype
    assert tokens == 0 or packed.stride(0) % packing.ALIGN == 0
    due = torch.full((n,), 0.5, dtype=torch.float64)
    due[slice(None) if columns is None else columns] += true.double().sum(0)
    assert torch.allclose(sums, due, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("align", [1, 8, 16, 64])
def test_rows_are_padded_with_zeros(align):
    packed = pack_padded(torch.randn(9, 21).bfloat16(), align=align)
    assert packed.shape == (1, 9, -(-21 // align) * align)
    assert bool((packed[:, :, 21:] == 0).all())
    assert torch.isfinite(packed).all()


def test_three_planes_are_float32_to_the_last_bit():
    """Values of every size, exact powers, ties and the largest numbers that round to finite."""
    x = torch.randn(65, 70) * 10.0 ** torch.randint(-20, 20, (65, 70))
    x[0, :6] = torch.tensor([0.0, -1.0, 1 + 2.0**-8, 1 + 2.0**-23, 3.3e38, -(1 + 3 * 2.0**-9)])
    mask = torch.arange(65) % 7 > 0
    mask[0] = True
    high, middle, low = pack(x, mask, planes=3)
    true = expected(x, mask, None).double()
    assert high.dtype == torch.bfloat16
    # the interpreter cuts off where a GPU rounds, so up to one unit in the last of 8 bits
    assert bool(((high.double() - true).abs() <= 2.0**-7 * true.abs()).all())
    assert torch.equal(high.double() + middle.double() + low.double(), true)


STRIDED = {
    "every-second-row": lambda x: x[::2],
    "every-second-column": lambda x: x[:, 1::2],
    "transposed": lambda x: x.T,
    "one-row-repeated": lambda x: x[:1].expand(50, -1),
    "inner-block": lambda x: x[3:40, 5:38],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view):
    x = view(torch.randn(66, 50))
    columns = torch.randperm(x.shape[1])
    assert torch.equal(pack(x, None, columns), x[:, columns])
    assert torch.equal(pack(x, None, columns[::2]), x[:, columns[::2]])


def test_masked_rows_are_not_read():
    x = torch.randn(40, 20)
    mask = torch.arange(40) % 3 > 0
    x[~mask] = torch.nan
    sums = torch.zeros(20, dtype=torch.float64)
    assert torch.isfinite(pack_padded(x, mask, planes=3, sum=sums)).all()
    assert torch.isfinite(sums).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_alone(dtype):
    x = (torch.randn(700, 140) + 0.5).to(dtype)
    mask = torch.rand(700) > 0.3
    sums = torch.ones(140, dtype=torch.float64)
    add_column_sums(x, mask, sums)
    column_sums_beside(x[:13], None, sums)()
    due = 1 + x[mask].double().sum(0) + x[:13].double().sum(0)
    assert torch.allclose(sums, due, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize(("dtype", "planes"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_planes_that_make_no_sense_are_refused(dtype, planes):
    with pytest.raises(ValueError, match=rf"planes must be 1, or 3 for float32; got {planes}"):
        pack(torch.zeros(3, 2, dtype=dtype), planes=planes)

"""What the kernel of cosines promises beyond the op: indices that are no rows, bits, a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from liar_ext.kernels.cosine import ROWS, row_cosines
from liar_ext.kernels.runtime import INTERPRET
from liar_ext.ops import row_cosines_reference
from liar_ext.ops.cosine import error_bound

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not INTERPRET, reason="kernels are compiled here")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    return request.param


def pair(tokens, columns, dtype=torch.float32, device="cuda"):
    x = torch.randn(tokens, columns, device=device)
    return x.to(dtype), (x + torch.randn(tokens, columns, device=device)).to(dtype)


def close(found, x, y, valid=None):
    expected = row_cosines_reference(x, y, valid)
    return float((found.double() - expected).abs().max()) <= error_bound(x.shape[1])


def test_an_index_that_is_no_row_is_not_read_and_gives_nan(device):
    """Rows in front of x and behind it, inside of a larger tensor, would show as numbers."""
    around = torch.ones(20, 24, device=device)
    x = around[5:15]
    x.copy_(torch.randn(10, 24))
    valid = torch.tensor([-1, 0, 9, 10, 3, -5, 2**40, -(2**62), 5], device=device)
    found = row_cosines(x, x.flip(0).contiguous(), valid)
    inside = (valid >= 0) & (valid < 10)
    assert torch.equal(found.isnan(), ~inside)
    assert close(found[inside], x, x.flip(0), valid[inside])


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS, ROWS + 1])
def test_writes_its_own_cosines_and_nothing_else(device, monkeypatch, count):
    x, y = pair(9, 40, device=device)
    around = torch.full((count + 2 * ROWS,), 7.0, device=device)
    inner = around[ROWS : ROWS + count]
    real = torch.empty

    def inside(*size, **options):
        return inner if size == (count,) else real(*size, **options)

    monkeypatch.setattr("liar_ext.kernels.cosine.torch.empty", inside)
    valid = torch.arange(count, device=device)
    assert close(row_cosines(x, y, valid), x, y, valid)
    inner.fill_(7.0)
    assert bool((around == 7.0).all())


def test_a_row_has_the_same_bits_in_any_company(device):
    """Wherever it stands, and whether or not a row of its program is read again."""
    x, y = pair(11, 300, device=device)

    def cosines(*rows):
        return row_cosines(x, y, torch.tensor(rows, device=device))

    alone = torch.cat([cosines(row) for row in range(11)])
    assert torch.equal(cosines(*range(11)), alone)
    order = torch.randperm(11)
    assert torch.equal(cosines(*order.tolist()), alone[order.to(device)])
    x[::3] *= 1e30
    y[1::3] *= 1e-30
    # 2^90 times as large: the same bits
    x[2] *= 2.0**90
    again = cosines(*range(11))
    assert torch.equal(again[2::3], alone[2::3])
    assert torch.equal(cosines(*order.tolist()), again[order.to(device)])


def test_a_factor_changes_no_bit(device):
    """Rows that are read again, times a power of two, beside the same rows in range."""
    x, y = pair(6, 200, device=device)
    plain = row_cosines(x, y)
    for exponents in ((-80, 0), (90, 0), (-90, 100), (100, 100), (-70, -70)):
        left, right = (value * 2.0**e for value, e in zip((x, y), exponents, strict=True))
        assert torch.equal(row_cosines(left, right), plain)


@pytest.mark.gpu
def test_the_same_bits_every_time():
    x, y = pair(5000, 4096, torch.bfloat16)
    assert torch.equal(row_cosines(x, y), row_cosines(x, y))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [896, 4096, 4099, 14336])
def test_widths_of_models(columns, dtype):
    x, y = pair(2001, columns, dtype)
    valid = torch.arange(2000, -1, -3, device="cuda")
    assert close(row_cosines(x, y), x, y)
    assert close(row_cosines(x, y, valid), x, y, valid)


@pytest.mark.gpu
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "some"])
def test_offsets_beyond_31_bits(indexed):
    """The last rows lie 2^31 elements behind the base."""
    tokens = 2**31 // 4096 + 5
    x = torch.zeros(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, 4096, device="cuda")
    valid = torch.arange(tokens - 3, tokens, device="cuda") if indexed else None
    found = row_cosines(x, x, valid)
    assert torch.allclose(found[-3:], torch.ones(3, device="cuda"), atol=error_bound(4096))
    assert not bool(found[:-3].any())


@pytest.mark.gpu
def test_graphs_record_and_replay():
    from liar_ext.ops import row_cosines as operator

    x, y = pair(700, 384, torch.bfloat16)
    valid = torch.arange(0, 700, 2, device="cuda")
    # the first call compiles, and tests itself
    operator(x, y, valid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = operator(x, y, valid)
    for value, new in zip((x, y), pair(700, 384, torch.bfloat16), strict=True):
        value.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert close(found, x, y, valid)


@pytest.mark.gpu
def test_work_follows_the_current_stream():
    """x is made late on another stream: work on any other one would read NaN."""
    true, y = pair(9000, 2048, torch.bfloat16)
    x = torch.full_like(true, torch.nan)
    row_cosines(x, y)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(true)
        found = row_cosines(x, y)
    stream.synchronize()
    assert close(found, true, y)


@pytest.mark.gpu
@needs_two
def test_the_device_of_the_tensors_counts():
    x, y = pair(70, 528, torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        found = row_cosines(x, y)
    assert found.device == x.device
    assert close(found, x, y)

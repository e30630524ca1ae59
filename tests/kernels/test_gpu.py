"""The product kernels on a GPU: values, truncation, streams, devices and graphs."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

pytest.importorskip("triton")

from liar_ext.kernels import pack as packing
from liar_ext.kernels import products, tune
from liar_ext.kernels.config import KERNELS, read_table
from liar_ext.kernels.cross import accumulate_cross
from liar_ext.kernels.gram import accumulate
from liar_ext.kernels.pack import add_column_sums, pack
from liar_ext.ops import Moments, gram_reference

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = [(1, 1), (17, 7), (300, 65), (4100, 200), (700, 528), (5000, 1552)]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "descriptor" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor maps need compute capability 9.0")
    return request.param


def bound(tokens: int) -> float:
    """Rounding of tests/ops/test_gram.py, and truncation of the longest sums."""
    return 2.0**-24 * (3 + tokens**0.5) + 7e-7


def activations(tokens: int, columns: int, dtype: torch.dtype, device: str = "cuda"):
    return (torch.randn(tokens, columns, device=device) + 0.5).to(dtype)


def check(x, mask, keep, ratio, kernel, **options):
    """Into Moments that are not empty, NaN above the diagonal, in the middle of NaN."""
    columns = x.shape[1]
    expected = gram_reference(x, mask, keep)
    panel = expected.gram.shape[1]
    around = torch.full((columns + 2, panel + 3), torch.nan, device=x.device)
    gram = around[1:-1, 2:-1]
    inside = torch.ones_like(gram, dtype=torch.bool).tril()
    gram[inside] = 0.5
    sums = torch.ones(columns, dtype=torch.float64, device=x.device)
    accumulate(x, mask, expected.order, gram, sums, kernel=kernel, **options)
    assert_close_rms(gram[inside], expected.gram[inside] + 0.5, ratio)
    assert_close_rms(sums, expected.sum + 1, 1e-13)
    gram[inside] = torch.nan
    assert bool(around.isnan().all())


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize(("tokens", "columns"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_matches_the_definition(dtype, tokens, columns, kept, masked, kernel):
    x = activations(tokens, columns, dtype)
    mask = torch.rand(tokens, device="cuda") > 0.3 if masked else None
    keep = torch.randperm(columns, device="cuda")[: (columns + 1) // 2] if kept else None
    check(x, mask, keep, bound(tokens), kernel)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_candidate_matches_the_definition(dtype, kernel):
    name = str(dtype).removeprefix("torch.")
    major, minor = torch.cuda.get_device_capability()
    newest = max(arch for arch in (80, 90, 100) if arch <= 10 * major + minor)
    for config in tune.candidates(kernel, name, newest):
        check(activations(1333, 400, dtype), None, None, bound(1333), kernel, config=config)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_truncation_is_promoted_away(dtype, kernel):
    """All-positive sums of 65536 tokens: kept in a tensor core they would lose about 8e-5."""
    x = torch.rand(65536, 256, device="cuda").to(dtype)
    out, expected = Moments.zeros(256, device="cuda"), gram_reference(x)
    accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
    lower = torch.ones_like(out.gram, dtype=torch.bool).tril()
    bias = (out.gram.double() / expected.gram - 1)[lower]
    assert abs(float(bias.mean())) <= 1e-6
    assert float(bias.abs().max()) <= 5e-6


def test_float32_products_keep_float32(kernel):
    x = torch.randn(4100, 300, device="cuda") * torch.logspace(-6, 6, 300, device="cuda")
    out = Moments.zeros(300, device="cuda")
    accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
    norms = x.double().norm(dim=0)
    error = (out.gram.double() - x.double().T @ x.double()) / (norms[:, None] * norms)
    assert float(error.tril().abs().max()) < 1e-6


@pytest.mark.parametrize("columns", [32784, 32788], ids=["in-place", "packed"])
def test_offsets_beyond_31_bits(columns, kernel):
    """In one launch where x is read in place: the last tokens lie 2^31 elements behind its base."""
    x = torch.zeros(products.TOKENS, columns, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(products.TOKENS, 16, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-3:, -5:], y[-3:, 1] = 2.0, 3.0
    cross = torch.zeros(columns, 16, device="cuda")
    sums = [torch.zeros(c, dtype=torch.float64, device="cuda") for c in (columns, 16)]
    accumulate_cross(x, y, None, cross, *sums, kernel=kernel)
    assert cross[-5:, 1].unique().tolist() == [18.0]
    assert float(cross.sum()) == 5 * 18.0
    assert (float(sums[0].sum()), float(sums[1].sum())) == (30.0, 9.0)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 1, 1), (300, 65, 7), (4100, 528, 1040)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_cross_moments_match_the_definition(dtype, tokens, n, m, masked, kernel):
    x, y = activations(tokens, n, dtype), activations(tokens, m, dtype)
    mask = torch.rand(tokens, device="cuda") > 0.3 if masked else None
    read = slice(None) if mask is None else mask
    cross = torch.full((n, m), 0.5, device="cuda")
    sums = [torch.zeros(c, dtype=torch.float64, device="cuda") for c in (n, m)]
    accumulate_cross(x, y, mask, cross, *sums, kernel=kernel)
    left, right = x[read].double(), y[read].double()
    assert_close_rms(cross, left.T @ right + 0.5, bound(tokens))
    assert_close_rms(sums[0], left.sum(0), 1e-13)
    assert_close_rms(sums[1], right.sum(0), 1e-13)


def test_planes_are_rounded_and_exact():
    x = torch.randn(300, 130, device="cuda") * 10.0 ** torch.randint(-20, 20, (300, 130)).cuda()
    columns = torch.randperm(130, device="cuda")
    high, middle, low = pack(x, None, columns, planes=3)
    assert torch.equal(high, x[:, columns].bfloat16())
    assert torch.equal(high.double() + middle.double() + low.double(), x[:, columns].double())


def test_work_follows_the_current_stream(kernel):
    """x is made late on another stream: work on any other one, the sums' too, would read zeros."""
    true = activations(9000, 2048, torch.bfloat16)
    assert true.numel() >= packing.BESIDE
    expected = gram_reference(true)
    out = Moments.zeros(2048, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x = true.clone()
        accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
        # of the same stream, so after the sums that were started beside the product
        x.zero_()
        found = (out.gram.clone(), out.sum.clone())
    stream.synchronize()
    assert_close_rms(found[0].tril(), expected.gram.tril(), bound(9000))
    assert_close_rms(found[1], expected.sum, 1e-13)


@pytest.mark.parametrize("tokens", [300, 9000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_graphs_record_and_replay(tokens, dtype, kernel):
    """No host waits, also where the sums run beside: 9000 tokens."""
    x = activations(tokens, 2048, dtype)
    mask = torch.rand(tokens, device="cuda") > 0.3 if tokens == 300 else None
    out = Moments.zeros(2048, device="cuda")
    accumulate(x, mask, None, out.gram, out.sum, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate(x, mask, None, out.gram, out.sum, kernel=kernel)
    x.copy_(activations(tokens, 2048, dtype))
    out.gram.zero_()
    out.sum.zero_()
    graph.replay()
    graph.replay()
    expected = gram_reference(x, mask)
    assert_close_rms(out.gram.tril(), 2 * expected.gram.tril(), bound(tokens))
    assert_close_rms(out.sum, 2 * expected.sum, 1e-13)


@needs_two
def test_the_device_of_the_tensors_counts(kernel):
    x = activations(700, 528, torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        check(x, None, None, bound(700), kernel)


def test_the_same_bits_every_time(kernel):
    x = activations(9000, 2048, torch.bfloat16)
    results = []
    for _ in range(2):
        out = Moments.zeros(2048, device="cuda")
        accumulate(x, None, None, out.gram, out.sum, kernel=kernel)
        results.append(out)
    assert torch.equal(results[0].gram, results[1].gram)
    assert torch.equal(results[0].sum, results[1].sum)


def test_sums_beside_are_those_alone():
    x = activations(9000, 2048, torch.bfloat16)
    alone = torch.zeros(2048, dtype=torch.float64, device="cuda")
    add_column_sums(x, None, alone)
    out = Moments.zeros(2048, device="cuda")
    accumulate(x, None, None, out.gram, out.sum)
    assert torch.equal(out.sum, alone)


def test_tuning_writes_a_table_for_this_device(tmp_path):
    path = tmp_path / "table.json"
    rows = tune.tune([512], 2048, ["bfloat16"], path, repeats=2)
    assert {row["kernel"] for row in rows if row["best"]} <= set(KERNELS)
    assert any(row["best"] for row in rows)
    table = read_table(path)
    assert table.device == torch.cuda.get_device_name()
    chosen = products.plan([activations(64, 512, torch.bfloat16)], False, False)
    assert chosen.kernel in KERNELS

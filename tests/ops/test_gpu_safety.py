"""What a GPU adds to the ops: graphs, streams, a second device. All against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms, covariance

from liar_ext.ops import (
    CrossMoments,
    Moments,
    attempt,
    attempt_reference,
    cross,
    cross_reference,
    gram,
    gram_reference,
    pack,
    pack_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype: torch.dtype, device: str, tokens: int = 700, columns: int = 200):
    x = (torch.randn(tokens, columns) + 0.2).to(device=device, dtype=dtype)
    mask = (torch.arange(tokens) % 5 > 0).to(device)
    keep = torch.randperm(columns)[:130].to(device)
    return x, mask, keep


def captured(call, replays: int = 1):
    """Warm up on a side stream, capture, replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("panel", [False, True], ids=["triangle", "panel"])
def test_gram_is_captured_in_a_graph(backend, dtype, panel):
    backend("triton")
    x, mask, keep = case(dtype, "cuda")
    keep = keep if panel else None
    out = Moments.zeros(x.shape[1], device="cuda", keep=keep)
    # the warm-up and two replays; a capture computes nothing
    captured(lambda: gram(x, mask, out=out), replays=2)
    expected = gram_reference(x, mask, keep)
    assert int(out.count) == 3 * int(expected.count)
    assert_close_rms(out.gram.tril(), 3 * expected.gram.tril(), 3e-6)
    assert_close_rms(out.sum, 3 * expected.sum, 3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_and_pack_are_captured_in_a_graph(backend, dtype):
    backend("triton")
    x, mask, keep = case(dtype, "cuda")
    y = x[:, :72].contiguous()
    out = CrossMoments.zeros(x.shape[1], 72, device="cuda")
    captured(lambda: cross(x, y, mask, out))
    assert_close_rms(out.cross, 2 * cross_reference(x, y, mask).cross, 3e-6)
    assert torch.equal(captured(lambda: pack(x, mask, keep)), pack_reference(x, mask, keep))


@pytest.mark.parametrize("size", [48, 200, 1200])
@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_solve_is_captured_in_a_graph(size, working):
    matrix = torch.stack([covariance(size, 1e3, seed) for seed in range(3)]).cuda()
    right = torch.randn(3, size, 24, dtype=torch.float64).cuda()
    strength = torch.full((3,), 1e-3, dtype=torch.float64).cuda()
    found = captured(lambda: attempt(matrix, right, strength, working=working))
    expected = attempt_reference(matrix.cpu(), right.cpu(), strength.cpu())
    assert_close_rms(found.solution, expected.solution, 1e-7)
    assert not bool(found.info.any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_work_follows_the_current_stream(backend, dtype):
    """x is made late on the same stream: work on another stream would read it too early."""
    backend("triton")
    x, mask, keep = case(dtype, "cuda", 20000, 256)
    # made before: looking at `keep` would wait for the stream that sleeps
    out = Moments.zeros(256, device="cuda", keep=keep)
    gram(x, mask, out=out)
    for value in (out.gram, out.sum, out.count):
        value.zero_()
    torch.cuda.synchronize()
    late, side = torch.full_like(x, float("nan")), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = gram(late, mask, out=out)
    side.synchronize()
    assert_close_rms(found.gram.tril(), gram_reference(x, mask, keep).gram.tril(), 3e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts_and_not_the_current_one():
    x, mask, keep = case(torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        found = gram(x, mask, keep=keep)
        matrix = covariance(96, 1e2)[None].to("cuda:1")
        right = torch.randn(1, 96, 3, dtype=torch.float64, device="cuda:1")
        solved = attempt(matrix, right, torch.zeros(1, dtype=torch.float64, device="cuda:1"))
    assert found.gram.device == x.device
    assert_close_rms(found.gram.tril(), gram_reference(x, mask, keep).gram.tril(), 3e-6)
    assert_close_rms((matrix @ solved.solution), right, 1e-10)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_is_bounded_on_sums_of_one_sign(backend, name, dtype):
    """Tensor cores truncate their running sum, and every term of a diagonal entry is positive."""
    backend(name)
    x = torch.rand(65536, 256, device="cuda").to(dtype)
    found, expected = gram(x), gram_reference(x)
    bias = (found.gram.double() / expected.gram - 1).tril()
    assert float(bias.abs().max()) <= 5e-6
    assert abs(float(bias.sum() / (256 * 257 / 2))) <= 1e-6

"""The emulator finds what it is there to find: a test that passes under it means something."""

from __future__ import annotations

import ctypes
import math
import re

import liar_cuda_host
import pytest
import torch

SELFTEST = "tests/support/cuda_host/selftest.cu"
LAUNCH_FAILURE, INVALID_VALUE, SHARED_LIMIT = 719, 1, 232448
reason = liar_cuda_host.unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(params=liar_cuda_host.ORDERS, ids=lambda order: f"order{order[0]}-{order[1]}")
def library(request):
    library = liar_cuda_host.build((SELFTEST,))
    library.cuda_host_order(*request.param)
    yield library
    library.cuda_host_order(0, 0)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_threads_meet_at_a_barrier_in_any_order(library):
    x = torch.arange(128.0)
    out = torch.full_like(x, torch.nan)
    assert library.selftest_reverse(pointer(x), pointer(out), 2, 1) == 0
    assert torch.equal(out.view(2, 64), x.view(2, 64).flip(1))


def test_a_missing_barrier_shows_as_poison(library):
    x = torch.arange(128.0)
    out = torch.zeros_like(x)
    assert library.selftest_reverse(pointer(x), pointer(out), 2, 0) == 0
    assert out.view(2, 64).isnan().any(1).all()


def test_lanes_exchange_64_bits_and_vote(library):
    x = torch.randn(32, dtype=torch.float64)
    out, votes = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    assert library.selftest_sum(pointer(x), pointer(out), pointer(votes)) == 0
    assert math.isclose(out.item(), x.sum().item(), rel_tol=1e-13, abs_tol=1e-13)
    assert votes.item() & 0xFFFFFFFF == sum(1 << i for i in range(32) if x[i] > 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, "32 of 64 threads have exited"),
        (1, "divergent barrier"),
        (2, "no thread can go on: .*__s"),
    ],
)
def test_divergence_is_reported_instead_of_hanging(library, how, message):
    assert library.selftest_diverge(how) == LAUNCH_FAILURE
    assert re.search(message, liar_cuda_host.report(library))


@pytest.mark.parametrize("at", [64, -1])
def test_a_write_outside_dynamic_shared_memory_is_reported(library, at):
    assert library.selftest_write(63, 64) == 0
    assert library.selftest_write(at, 64) == LAUNCH_FAILURE
    assert "outside the 64 bytes" in liar_cuda_host.report(library)


def test_more_shared_memory_than_the_device_has_is_refused(library):
    assert library.selftest_write(0, SHARED_LIMIT) == 0
    assert library.selftest_write(0, SHARED_LIMIT + 1) == INVALID_VALUE


def test_every_block_starts_with_poisoned_shared_memory(library):
    out = torch.zeros(2)
    assert library.selftest_read(pointer(out)) == 0
    assert out.isnan().all()

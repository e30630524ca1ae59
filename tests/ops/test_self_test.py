"""An implementation that is wrong on a device is not used there, and says so."""

from __future__ import annotations

import pytest
import torch

from liar_ext.errors import BackendError
from liar_ext.ops import backends, self_test

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
ERRORS = {
    "gram": self_test.gram_error,
    "cross": self_test.cross_error,
    "pack": self_test.pack_error,
    "solve": self_test.solve_error,
}


@pytest.mark.parametrize("op", ERRORS)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_right_implementations_pass(op, name):
    run = backends._REGISTRY[op][name].run
    for dtype in (torch.float64, torch.float32):
        error, bound = ERRORS[op](run, CPU, dtype)
        assert error <= bound


def off_by_one_row(x, mask, order, gram, sum, count):
    backends._REGISTRY["gram"]["torch"].run(x, mask, order, gram, sum, count)
    gram[7].mul_(1.001)


def never_writes(*arguments):
    return None


@pytest.mark.parametrize("wrong", [off_by_one_row, never_writes])
def test_wrong_ones_do_not(wrong):
    error, bound = self_test.gram_error(wrong, CPU, torch.float32)
    assert error > bound


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A registry of one op on a device that is not there: a broken kernel, then torch."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "_REGISTRY", {})
    backends._self_test.cache_clear()
    backends.register("op", "torch")(lambda: "torch")

    def add(outcome, automatic=True):
        def test(run, device, dtype):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome, 1e-5

        backends.register("op", "triton", self_test=test, automatic=automatic)(lambda: "triton")

    yield add
    backends._self_test.cache_clear()


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (0.25, r"wrong: relative error 2\.5e-01, bound 1e-05"),
        (float("nan"), "wrong: relative error nan"),
        (RuntimeError("CUtensorMap must be aligned\nmore"), "failed: CUtensorMap must be aligned;"),
    ],
)
def test_a_failed_self_test_is_a_warning_and_the_next_backend(pretend_gpu, outcome, words):
    pretend_gpu(outcome)
    with pytest.warns(RuntimeWarning, match=words):
        assert backends.select("op", GPU, torch.float32).run() == "torch"
    # once: the second time it is known
    assert backends.select("op", GPU, torch.float32).run() == "torch"


def test_forcing_a_backend_that_failed_its_self_test_is_an_error(pretend_gpu, backend):
    pretend_gpu(0.25)
    backend("triton")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(BackendError, match=r"LIAR_BACKEND=triton cannot run op.*self-test is wrong"),
    ):
        backends.select("op", GPU, torch.float32)


def test_a_backend_that_passed_is_used(pretend_gpu):
    pretend_gpu(1e-7)
    assert backends.select("op", GPU, torch.float32).run() == "triton"


def test_what_is_not_automatic_is_used_only_when_forced(pretend_gpu, backend):
    pretend_gpu(1e-7, automatic=False)
    assert backends.select("op", GPU, torch.float32).run() == "torch"
    backend("triton")
    assert backends.select("op", GPU, torch.float32).run() == "triton"

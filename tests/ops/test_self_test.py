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
    "cosine": self_test.cosine_error,
    "solve": self_test.solve_error,
}


@pytest.mark.parametrize("op", ERRORS)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_right_implementations_pass(op, name):
    run = backends._REGISTRY[op][name].run
    for dtype in (torch.float64, torch.float32):
        error, bound = ERRORS[op](run, CPU, dtype)
        assert error <= bound


@pytest.mark.parametrize("op", ["gram", "cross", "pack", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_triton_versions_pass_in_the_interpreter(op, dtype):
    pytest.importorskip("triton")
    error, bound = ERRORS[op](backends._REGISTRY[op]["triton"].run, CPU, dtype)
    assert error <= bound


def run_torch(op, *arguments):
    return backends._REGISTRY[op]["torch"].run(*arguments)


def off_by_one_row(x, mask, order, gram, sum, count):
    backends._REGISTRY["gram"]["torch"].run(x, mask, order, gram, sum, count)
    gram[4].mul_(1.001)


def never_writes(*arguments):
    return None


def overwrites(x, mask, order, gram, sum, count):
    for value in (gram, sum, count):
        value.zero_()
    run_torch("gram", x, mask, order, gram, sum, count)


def stops_after_512_tokens(x, mask, order, gram, sum, count):
    rows = slice(0, 512)
    run_torch("gram", x[rows], None if mask is None else mask[rows], order, gram, sum, count)
    count.add_((x if mask is None else mask[mask])[512:].shape[0])


def in_two_planes(x, mask, order, gram, sum, count):
    high = x.bfloat16().float()
    run_torch("gram", high + (x - high).bfloat16().float(), mask, order, gram, sum, count)


@pytest.mark.parametrize(
    "wrong", [off_by_one_row, never_writes, overwrites, stops_after_512_tokens, in_two_planes]
)
def test_wrong_ones_do_not(wrong):
    error, bound = self_test.gram_error(wrong, CPU, torch.float32)
    assert error > bound


def split(x):
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    return {"h": high, "m": middle, "l": x - high - middle}


@pytest.mark.parametrize("left_out", ["", "hm", "mh", "hl", "lh", "mm"])
def test_every_product_of_split_float32_counts(left_out):
    """What is left out of them is 1e-6 of a Gram matrix and less: no more than truncation costs."""

    def products(x, y):
        a, b = split(x), split(y)
        pairs = [pair for pair in ("hh", "hm", "mh", "hl", "lh", "mm") if pair != left_out]
        return sum(a[i].double().T @ b[j].double() for i, j in pairs)

    def gram(x, mask, order, gram, sum, count):
        x = x if mask is None else x[mask]
        sum += x.double().sum(0)
        count += x.shape[0]
        x = x if order is None else x[:, order]
        gram += products(x, x)[:, : gram.shape[1]].float()

    def cross(x, y, mask, cross, sum_x, sum_y):
        x, y = (x, y) if mask is None else (x[mask], y[mask])
        cross += products(x, y).float()
        sum_x += x.double().sum(0)
        sum_y += y.double().sum(0)

    for test, run in ((self_test.gram_error, gram), (self_test.cross_error, cross)):
        error, bound = test(run, CPU, torch.float32)
        assert (error > bound) == bool(left_out)


def never_flushed(x, mask, order, gram, sum, count):
    """A tensor core that keeps its sum: 16 products are exact, the sum is cut off to 24 bits."""
    x = x if mask is None else x[mask]
    sum += x.double().sum(0)
    count += x.shape[0]
    x = (x if order is None else x[:, order]).double()
    total = torch.zeros(x.shape[1], gram.shape[1], dtype=torch.float64)
    for part in x.split(16):
        total += part.T @ part[:, : gram.shape[1]]
        unit = 2.0 ** (torch.frexp(total)[1] - 24).double()
        total = (total / unit).trunc() * unit
    gram += total.float()


def test_a_sum_that_stays_in_the_tensor_core_shows():
    error, bound = self_test.gram_error(never_flushed, CPU, torch.bfloat16)
    assert error > bound


def plain(x, y, valid):
    """float32 sums without a factor."""
    x, y = (part.float() if valid is None else part[valid].float() for part in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def zero_for_nan(x, y, valid):
    return run_torch("cosine", x, y, valid).nan_to_num(0.0)


def nan_for_zero(x, y, valid):
    found = run_torch("cosine", x, y, valid)
    return found.where(found != 0, torch.nan)


def without_the_last_column(x, y, valid):
    return run_torch("cosine", x[:, :-1], y[:, :-1], valid)


def one_step_of_512(x, y, valid):
    return run_torch("cosine", x[:, :512], y[:, :512], valid)


def rows_as_they_come(x, y, valid):
    count = len(x) if valid is None else len(valid)
    return run_torch("cosine", x[:count], y[:count], None)


def in_16_bits(x, y, valid):
    return run_torch("cosine", x.bfloat16(), y.bfloat16(), valid)


def packed_rows(x, y, valid):
    """As if rows followed each other without a gap."""
    flat = (part.as_strided(part.shape, (part.shape[1], 1)) for part in (x, y))
    return run_torch("cosine", *flat, valid)


def clamped_norms(x, y, valid):
    x, y = (part if valid is None else part[valid] for part in (x, y))
    return torch.cosine_similarity(x.double(), y.double(), dim=1).clamp(-1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        *(plain, zero_for_nan, nan_for_zero, without_the_last_column, one_step_of_512),
        *(rows_as_they_come, in_16_bits, packed_rows, clamped_norms),
    ],
)
def test_wrong_cosines_do_not_pass(wrong):
    error, bound = self_test.cosine_error(wrong, CPU, torch.float32)
    assert error > bound


def first_for_all(matrix, right, *rest):
    return run_torch("solve", matrix[:1].expand_as(matrix), right[:1].expand_as(right), *rest)


def in_plain_float32(matrix, right, *rest):
    return run_torch("solve", matrix.float().double(), right, *rest)


def without_a_residual(*arguments):
    found = run_torch("solve", *arguments)
    return found._replace(error=torch.ones_like(found.error))


def never_failing(*arguments):
    found = run_torch("solve", *arguments)
    return found._replace(info=torch.zeros_like(found.info))


@pytest.mark.parametrize(
    "wrong", [first_for_all, in_plain_float32, without_a_residual, never_failing]
)
def test_wrong_solves_do_not(wrong):
    error, bound = self_test.solve_error(wrong, CPU, torch.float64)
    assert error > bound


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A registry of one op on a device that is not there: a broken kernel, then torch."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "_REGISTRY", {})
    backends._TESTED.clear()
    backends.register("op", "torch")(lambda: "torch")

    def add(outcome):
        def test(run, device, dtype):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome, 1e-5

        backends.register("op", "triton", self_test=test)(lambda: "triton")

    yield add
    backends._TESTED.clear()


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


def test_a_graph_records_what_ran_before_and_nothing_untested(pretend_gpu, monkeypatch):
    pretend_gpu(0.25)
    with pytest.warns(RuntimeWarning):
        backends.select("op", GPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.select("op", GPU, torch.float32).run() == "torch"
    with pytest.raises(BackendError, match="run it once before capturing"):
        backends.select("op", GPU, torch.bfloat16)


def test_too_little_memory_is_no_verdict(pretend_gpu):
    pretend_gpu(torch.OutOfMemoryError("full"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            backends.select("op", GPU, torch.float32)


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

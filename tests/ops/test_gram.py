"""`gram` against its float64 definition, on every backend that runs here."""

from __future__ import annotations

import dataclasses
import doctest
import sys
from importlib.util import find_spec

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.ops import Moments, _extension, gram, gram_reference
from liar_ext.ops import gram as gram_function

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = (0, 1, 7, 130)
COLUMNS = (1, 3, 65, 200)

# the interpreter takes 0.1 to 0.4 s for one case: one of each size, not their product
SIZES = {
    "torch": [(t, n) for t in TOKENS for n in COLUMNS],
    "cpu": [(t, n) for t in TOKENS for n in COLUMNS],
    "triton": [(0, 3), (1, 1), (7, 65), (130, 200)],
}

MASKS = ("unmasked", "masked", "nothing-valid")
KEEPS = ("whole", "some-kept", "all-but-one-kept")
PAIRS = [(MASKS[0], KEEPS[0]), (MASKS[1], KEEPS[0]), (MASKS[0], KEEPS[1])]
PAIRS += [(MASKS[1], KEEPS[2]), (MASKS[2], KEEPS[1]), (MASKS[1], "first-kept")]

needs_extension = pytest.mark.skipif(
    _extension.unavailable() is not None, reason=str(_extension.unavailable())
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
NEEDS = {"cpu": [needs_extension], "triton": [needs_triton]}
BACKENDS = [pytest.param(name, marks=NEEDS.get(name, [])) for name in ("torch", "cpu", "triton")]


def cases():
    for backend, sizes in SIZES.items():
        for name, dtype in DTYPES.items():
            for tokens, columns in sizes:
                for mask, keep in PAIRS:
                    yield pytest.param(
                        backend, dtype, tokens, columns, mask, keep,
                        marks=NEEDS.get(backend, []),
                        id=f"{backend}-{name}-T{tokens}-n{columns}-{mask}-{keep}",
                    )  # fmt: skip


def activations(tokens: int, columns: int, dtype: torch.dtype = torch.float32):
    """Mean 0.5, so that column sums do not cancel and a ratio to them means something."""
    return (torch.randn(tokens, columns) + 0.5).to(dtype)


def mask_of(kind: str, tokens: int):
    if kind == "unmasked":
        return None
    return torch.rand(tokens) > 0.3 if kind == "masked" else torch.zeros(tokens, dtype=torch.bool)


def keep_of(kind: str, columns: int):
    if kind == "whole":
        return None
    count = columns - 1 if kind == "all-but-one-kept" else (columns + 2) // 3
    return torch.arange(count) if kind == "first-kept" else torch.randperm(columns)[:count]


def rounding(tokens: int) -> float:
    """Relative rms error of a float32 sum of `tokens` products: a walk of √T roundings of 2^-24.

    Products of 16-bit values are exact in float32, so the dtype of x does not enter. The constant
    covers the rounding of short sums, where the walk has no length.
    """
    return 2.0**-24 * (2 + tokens**0.5)


def assert_moments(actual: Moments, expected: Moments, ratio: float) -> None:
    assert actual.count.item() == expected.count.item()
    # float64 all the way: the intercept of a repair is no better than the means
    assert_close_rms(actual.sum, expected.sum, min(ratio, 1e-13))
    assert_close_rms(actual.gram.tril(), expected.gram.tril(), ratio)


@pytest.mark.parametrize(("name", "dtype", "tokens", "columns", "mask", "keep"), list(cases()))
def test_matches_the_definition(backend, name, dtype, tokens, columns, mask, keep):
    backend(name)
    x, valid, kept = (
        activations(tokens, columns, dtype),
        mask_of(mask, tokens),
        keep_of(keep, columns),
    )
    # a float32 product is six of bfloat16 planes there, added up one after the other
    terms = 6 * tokens if name == "triton" and dtype == torch.float32 else tokens
    assert_moments(gram(x, valid, keep=kept), gram_reference(x, valid, kept), rounding(terms))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("keep", KEEPS)
def test_accumulates_into_out_and_ignores_the_upper_triangle(backend, name, keep):
    backend(name)
    kept = keep_of(keep, 65)
    first, second = activations(40, 65), activations(33, 65)
    mask = mask_of("masked", 33)
    expected = gram_reference(first, None, kept) + gram_reference(second, mask, kept)

    out = Moments.zeros(65, keep=kept)
    above = torch.ones_like(out.gram, dtype=torch.bool).triu(1)
    out.gram[above] = torch.nan
    gram(first, out=out)
    out.gram[above] = torch.nan
    out.mirrored = True
    assert gram(second, mask, out=out, keep=kept) is out
    assert not out.mirrored
    assert_moments(out, expected, rounding(73))


@pytest.mark.parametrize("name", BACKENDS)
def test_reads_nothing_but_the_valid_rows_of_x(backend, name):
    backend(name)
    surroundings = torch.full((140, 80), torch.nan)
    x = surroundings[5:135, 7:72]
    mask = mask_of("masked", 130)
    x[mask] = activations(int(mask.sum()), 65)
    assert not x.is_contiguous()
    assert_moments(gram(x, mask), gram_reference(x, mask), rounding(130))


STRIDED = {
    "every-second-row": lambda x: x[::2],
    "every-second-column": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "one-row-repeated": lambda x: x[:1].expand(50, -1),
    "one-column": lambda x: x[:, 3:4],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_strides(backend, name, view):
    backend(name)
    x = view(activations(66, 50))
    assert_moments(gram(x), gram_reference(x), rounding(x.shape[0]))


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_input_does_not_give_bfloat16_sums(backend, name):
    backend(name)
    x = torch.full((300, 4), 1.0, dtype=torch.bfloat16)
    # bfloat16 cannot hold 300: it would be 300 rounded to 8 bits, or stuck at 256
    x[0] = 2.0
    moments = gram(x)
    assert moments.gram.dtype == torch.float32
    assert moments.gram.tril().unique().tolist() == [0.0, 303.0]
    assert moments.sum.unique().tolist() == [301.0]


@pytest.mark.parametrize("name", BACKENDS)
def test_nonfinite_values_reach_the_sums(backend, name):
    backend(name)
    x = activations(20, 6)
    x[3, 2], x[4, 5] = torch.nan, torch.inf
    sums = gram(x).sum
    assert torch.isfinite(sums).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_float64_moments(backend, name):
    backend(name)
    x = activations(130, 65).double()
    out = gram(x, out=Moments.zeros(65, dtype=torch.float64))
    assert_moments(out, gram_reference(x), 1e-14)


def test_float32_stays_float32_when_the_process_allows_less():
    x = activations(300, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        moments = gram_function(x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_moments(moments, gram_reference(x), rounding(300))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_not_recorded(backend, name):
    backend(name)
    moments = gram(activations(9, 5).requires_grad_())
    assert not moments.gram.requires_grad


INVALID = {
    "vector": (lambda: gram(torch.zeros(3)), r"\(tokens, columns\).*\(3,\)"),
    "no columns": (lambda: gram(torch.zeros(3, 0)), r"at least one column.*\(3, 0\)"),
    "integers": (lambda: gram(torch.zeros(3, 2, dtype=torch.int64)), "torch.int64"),
    "mask length": (lambda: gram(torch.zeros(3, 2), torch.ones(2)), r"\(3,\).*\(2,\)"),
    "mask shape": (lambda: gram(torch.zeros(3, 2), torch.ones(3, 1)), r"\(3,\).*\(3, 1\)"),
    "other columns": (lambda: gram(torch.zeros(3, 2), out=Moments.zeros(4)), "for 4 columns"),
    "float64": (lambda: gram(torch.zeros(3, 2).double()), "dtype=torch.float64"),
    "float64 into float32": (
        lambda: gram(torch.zeros(3, 2).double(), out=Moments.zeros(2)),
        "use float64 Moments",
    ),
    "half moments": (
        lambda: gram(torch.zeros(3, 2), out=Moments.zeros(2, dtype=torch.bfloat16)),
        "float32 or float64; got torch.bfloat16",
    ),
    "keep out of range": (
        lambda: gram(torch.zeros(3, 2), keep=torch.tensor([0, 2])),
        r"0\.\.1; it spans 0\.\.2",
    ),
    "keep negative": (lambda: gram(torch.zeros(3, 2), keep=torch.tensor([-1])), r"spans -1\.\.-1"),
    "keep repeated": (lambda: gram(torch.zeros(3, 2), keep=torch.tensor([1, 1])), "repeats"),
    "keep as a mask": (
        lambda: gram(torch.zeros(3, 2), keep=torch.tensor([True, False])),
        "integer column indices",
    ),
    "keep differs from out": (
        lambda: gram(
            torch.zeros(3, 2),
            out=Moments.zeros(2, keep=torch.tensor([0])),
            keep=torch.tensor([1]),
        ),
        "differs",
    ),
}


@pytest.mark.parametrize(("call", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", BACKENDS)
def test_keeping_no_column_still_counts_and_sums(backend, name):
    backend(name)
    x = activations(20, 5)
    moments = gram(x, keep=torch.empty(0, dtype=torch.int64))
    assert moments.gram.shape == (5, 0)
    assert moments.count.item() == 20
    assert_close_rms(moments.sum, x.double().sum(0), rounding(20))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("keep", KEEPS[:2])
def test_torch_library_accepts_the_operator(backend, name, keep):
    backend(name)
    x, mask = activations(30, 17), mask_of("masked", 30)
    out = Moments.zeros(17, keep=keep_of(keep, 17))
    torch.library.opcheck(
        torch.ops.liar_ext.gram_accumulate.default,
        (x, mask, out.order, out.gram, out.sum, out.count),
    )


def test_the_docstring_example_holds():
    result = doctest.testmod(sys.modules["liar_ext.ops.gram"])
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_kept_columns_that_come_first_are_read_where_they_are():
    assert Moments.zeros(9, keep=torch.arange(4)).order is None
    assert Moments.zeros(9, keep=torch.tensor([0, 2, 1])).order is not None
    x = activations(50, 9)
    out = gram(x, keep=torch.arange(4))
    assert out.gram.shape == (9, 4)
    with pytest.raises(ValueError, match="keep differs"):
        gram(x, out=out, keep=torch.tensor([1, 0, 2, 3]))


@needs_extension
class TestCompiled:
    @pytest.mark.parametrize("keep", KEEPS[:2])
    @pytest.mark.parametrize("path", _extension.PATHS[1:])
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
    def test_every_path_matches_the_definition(self, dtype, path, keep):
        """500 columns cross the squares of 384; 8415 valid tokens, the chunk of 8388."""
        if path not in _extension.gram_paths(dtype):
            pytest.skip(f"{path} cannot run {dtype} on this CPU")
        x, mask = activations(8500, 500, dtype), torch.arange(8500) % 100 > 0
        expected = gram_reference(x, mask, keep_of(keep, 500))
        out = Moments.zeros(
            500, keep=None if expected.order is None else expected.order[: expected.gram.shape[1]]
        )
        _extension.gram(x, mask.nonzero().flatten(), out.order, out.gram, out.sum, path)
        out.count += mask.sum()
        assert_moments(out, expected, rounding(8500))

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
    def test_the_number_of_threads_does_not_change_a_bit(self, backend, dtype):
        backend("cpu")
        if _extension.gram_path(dtype) == "blas":
            pytest.skip("the BLAS divides its sums by threads")
        # 4500 tokens are work for 4 threads
        x = activations(4500, 500, dtype)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(gram(x))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert torch.equal(other.gram.tril(), results[0].gram.tril())
            assert torch.equal(other.sum, results[0].sum)

    def test_a_path_that_cannot_run_is_refused(self):
        out = Moments.zeros(4)
        with pytest.raises(ValueError, match="cannot run here"):
            _extension.gram(torch.zeros(2, 4), None, None, out.gram, out.sum, "avx512_bf16")


@pytest.mark.gpu
@pytest.mark.parametrize(("mask", "keep"), PAIRS)
@pytest.mark.parametrize(
    ("tokens", "columns"), [(0, 3), (1, 1), (7, 65), (4100, 513), (20000, 1024)]
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_matches_the_definition_on_a_gpu(backend, name, dtype, tokens, columns, mask, keep):
    backend(name)
    x = activations(tokens, columns, dtype).cuda()
    valid, kept = mask_of(mask, tokens), keep_of(keep, columns)
    valid = None if valid is None else valid.cuda()
    kept = None if kept is None else kept.cuda()
    # tensor cores truncate their running sum instead of rounding it: one-sided, up to one unit in
    # the last place of the sum for each step of 16 tokens, between flushes: ours are 512 tokens
    # apart, those of cuBLAS one call
    flush = 512 if name == "triton" else 16384
    bound = rounding(6 * tokens) + 2.0**-23 * min(tokens, flush) / 16
    assert_moments(gram(x, valid, keep=kept), gram_reference(x, valid, kept), bound)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sum": torch.zeros(8)}, "out.sum must be"),
        ({"sum": torch.zeros(9, dtype=torch.float64)}, "columns"),
        ({"sum": torch.zeros(16, dtype=torch.float64)[::2]}, "contiguous"),
        ({"count": torch.zeros(())}, "out.count must be"),
        ({"order": torch.arange(8) + 1}, "permutation"),
    ],
    ids=["float32 sum", "long sum", "strided sum", "float count", "order"],
)
def test_moments_made_by_hand_are_checked_before_anything_is_written(change, says):
    out = dataclasses.replace(Moments.zeros(8), **change)
    with pytest.raises(ValueError, match=says):
        gram(torch.ones(10, 8), out=out)


@pytest.mark.parametrize("api", ["legacy", "per backend"])
def test_reduced_float32_products_are_switched_off_and_on_again(api, backend):
    backend("torch")
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        if api == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            for place in places:
                place.fp32_precision = "tf32"
        x = torch.randn(300, 70)
        found = gram(x).gram.tril()
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
        assert_close_rms(found, gram_reference(x).gram.tril(), 1e-6)
    finally:
        if api == "legacy":
            torch.set_float32_matmul_precision("highest")
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value

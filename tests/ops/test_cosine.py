"""Cosines of rows against their definition, on every backend, and on a GPU where there is one."""

from __future__ import annotations

import doctest
import math
import mmap
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liar_ext.errors import BackendError
from liar_ext.ops import backends, row_cosines, row_cosines_reference
from liar_ext.ops import cosine as op
from liar_ext.ops.cosine import cosine_bytes, cosine_rows, error_bound

# interpreted kernels are NumPy, which mentions every infinity
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NARROW = DTYPES[:3]
# one column; less and more than a step of the kernel's loop; rows that fill no program
SIZES = [(0, 3), (1, 1), (37, 66), (6, 128), (10, 1100), (3, 1537)]


GPU = pytest.mark.gpu
PLACES = [
    *(("reference", "cpu"), ("torch", "cpu"), ("triton", "cpu")),
    *(pytest.param(("torch", "cuda"), marks=GPU), pytest.param(("triton", "cuda"), marks=GPU)),
]


@pytest.fixture(params=PLACES, ids=" on ".join)
def place(request, backend):
    """A backend, forced, and a device; Triton on CPU tensors where kernels are interpreted."""
    name, device = request.param
    if name == "triton":
        pytest.importorskip("triton")
        from liar_ext.kernels.runtime import INTERPRET

        if device == "cpu" and not INTERPRET:
            pytest.skip("kernels are compiled here")
    backend(name)
    return name, device


@pytest.fixture
def name(place):
    return place[0]


@pytest.fixture
def device(place):
    return place[1]


@pytest.fixture(autouse=True)
def poisoned():
    """Freshly allocated memory is NaN: a cosine that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def skip_float64(name, *dtypes):
    if name == "triton" and torch.float64 in dtypes:
        pytest.skip("float32 sums")


def check(x, y, valid=None):
    """Against the definition; float64 to its own rounding."""
    before = x.clone(), y.clone()
    found = row_cosines(x, y, valid)
    expected = row_cosines_reference(x, y, valid)
    wide = torch.float64 in (x.dtype, y.dtype)
    assert found.dtype == (torch.float64 if wide else torch.float32)
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    known = ~expected.isnan()
    bound = 1e-15 * (2 + x.shape[1] ** 0.5) if wide else error_bound(x.shape[1])
    error = (found[known].double() - expected[known]).abs()
    assert error.numel() == 0 or float(error.max()) <= bound
    # arccos exists
    assert bool((found[known].abs() <= 1).all())
    for now, was in zip((x, y), before, strict=True):
        assert torch.equal(now.nan_to_num(), was.nan_to_num())
    return found


def rows_of(tokens, columns, dtype, device):
    """Cosines of all sizes: from nearly opposite rows to nearly parallel ones."""
    x = torch.randn(tokens, columns, dtype=torch.float64)
    y = torch.linspace(-2, 2, tokens, dtype=torch.float64)[:, None] * x + torch.randn_like(x)
    return x.to(device=device, dtype=dtype), y.to(device=device, dtype=dtype)


def test_the_definition_is_the_formula():
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    plain = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    assert torch.allclose(row_cosines_reference(x, y), plain, rtol=0, atol=1e-15)
    some = torch.tensor([3, 0, 3])
    assert torch.equal(row_cosines_reference(x, y, some), row_cosines_reference(x, y)[some])
    for size in (1e-300, 1e300):
        assert torch.allclose(row_cosines_reference(x * size, y), plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["all", "some", "none"])
@pytest.mark.parametrize(("tokens", "columns"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_definition(name, device, dtype, tokens, columns, kind):
    skip_float64(name, dtype)
    x, y = rows_of(tokens, columns, dtype, device)
    valid = None
    if kind != "all":
        wanted = torch.rand(tokens) < (0.6 if kind == "some" else -1.0)
        # padding is never looked at
        x[~wanted.to(device)], y[~wanted.to(device)] = torch.nan, torch.inf
        valid = wanted.nonzero().flatten().to(device)
    found = check(x, y, valid)
    assert not bool(found.isnan().any())


def test_rows_in_any_order_and_more_than_once(name, device):
    x, y = rows_of(9, 40, torch.float32, device)
    check(x, y, torch.tensor([8, 0, 3, 3, 3, 7, 0, 1, 2, 8, 8], device=device))
    # every second entry of an index tensor
    check(x, y, torch.tensor([8, 99, 0, -5, 3, 99], device=device)[::2])


STRIDED = {
    "every-second-row": lambda x: x[::2],
    "rows-of-a-wider-tensor": lambda x: x[:, 32:96],
    "unaligned-rows": lambda x: x[:, 3:90],
    "every-second-column": lambda x: x[:, 1::2],
    "transposed": lambda x: x.T,
    "one-row-repeated": lambda x: x[:1].expand(50, -1),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(name, device, dtype, view):
    x, y = rows_of(48, 112, dtype, device)
    left, right = view(x), view(y)
    valid = torch.arange(left.shape[0] - 1, -1, -3, device=device)
    check(left, right, valid)
    # x and y each have their own
    check(left, right.contiguous())


def test_columns_further_apart_than_32_bits_count(backend):
    """A transposed tensor of more than 2^31 elements, of whose 4.6 GB three rows are touched."""
    pytest.importorskip("triton")
    from liar_ext.kernels.runtime import INTERPRET

    if not INTERPRET or sys.platform != "linux":
        pytest.skip("kernels are compiled here, or memory is not Linux's")
    backend("triton")
    tokens, columns = 1 << 21, 1100
    # small pages that nobody has touched take no memory; large ones would, all of it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, 2 * tokens * columns, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    far = torch.frombuffer(pages, dtype=torch.bfloat16).view(columns, tokens).T
    rows = torch.tensor([5, tokens - 1, 1 << 20])
    near = torch.randn(1, columns, dtype=torch.bfloat16).expand(tokens, -1)
    far[rows] = near[:3] + torch.randn(3, columns, dtype=torch.bfloat16)
    expected = row_cosines_reference(far, near, rows)
    for x, y in ((far, near), (near, far)):
        error = (row_cosines(x, y, rows).double() - expected).abs()
        assert float(error.max()) <= error_bound(columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_have_no_direction(name, device, dtype):
    skip_float64(name, dtype)
    x, y = rows_of(6, 33, dtype, device)
    x[0] = y[1] = x[2] = y[2] = 0.0
    x[3] = -0.0
    assert check(x, y)[:4].tolist() == [0.0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_never_hidden(name, device, dtype, value):
    """Beside ordinary rows, zeros, the largest numbers and the smallest; in the last column too."""
    skip_float64(name, dtype)
    limits = torch.finfo(dtype)
    for other in (1.0, 0.0, limits.max / 8, limits.smallest_normal):
        x = torch.ones(8, 21, dtype=dtype, device=device)
        y = torch.full_like(x, other)
        for row in range(6):
            (x if row % 2 else y)[row, (0, 7, 20)[row // 2]] = value
        found = check(x, y)
        assert found.isnan().tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_cosine_does_not_depend_on_the_size_of_its_rows(name, device, dtype):
    """Sizes of rows from the smallest numbers to the largest, in x and in y independently.

    All values are normal: Triton's interpreter widens subnormal bfloat16 wrongly.
    """
    limits = torch.finfo(dtype)
    low, high = (int(math.log2(value)) for value in (limits.smallest_normal, limits.max / 4))
    sizes = torch.tensor(sorted({*range(low, high, 17), low, low + 1, high}), dtype=torch.float64)
    pairs = 2.0 ** torch.cartesian_prod(sizes, sizes)
    # magnitudes in [1, 2): of such rows of 24 columns the sums of squares leave float32
    x, y = ((1 + torch.rand(len(pairs), 24)).double() for _ in range(2))
    x *= torch.where(torch.rand(len(pairs), 24) < 0.5, -1.0, 1.0)
    x, y = ((pairs[:, i : i + 1] * z).to(device, dtype) for i, z in enumerate((x, y)))
    assert not bool(check(x, y).isnan().any())


@pytest.mark.parametrize("exponent", range(-149, 120, 16))
def test_subnormal_and_huge_float32(name, device, exponent):
    """Down to the smallest number there is, of which a row has a few values only."""
    x, y = rows_of(7, 40, torch.float64, "cpu")
    x = (x * 2.0**exponent).float().to(device)
    check(x, y.float().to(device))
    check(x, x.flip(0).contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_subnormal_bfloat16_on_a_gpu(backend, name):
    backend(name)
    x, y = rows_of(64, 48, torch.float64, "cpu")
    x = (x * 2.0**-130).to("cuda", torch.bfloat16)
    assert bool((x != 0).any())
    check(x, y.to("cuda", torch.bfloat16))


@pytest.mark.parametrize("exponent", [-41.0, -40.0, -39.5, 59.5, 60.0, 60.5])
def test_where_rows_start_to_be_read_again(name, device, exponent):
    """Sums of squares around 2^-80 and 2^120, on both sides of it in one program."""
    x, y = rows_of(8, 30, torch.float64, "cpu")
    x = x / x.norm(dim=1, keepdim=True) * 2.0**exponent
    x *= 2.0 ** torch.linspace(-0.2, 0.2, 8, dtype=torch.float64)[:, None]
    check(x.float().to(device), y.float().to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parallel_rows_stay_within_one(name, device, dtype):
    x = torch.randn(150, 37).to(device, dtype)
    found = check(x, x * -4)
    assert torch.allclose(found, torch.full_like(found, -1.0), rtol=0, atol=error_bound(37))
    assert bool(torch.isfinite(found.arccos()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_of_one_sign_keep_the_bound(name, device, dtype):
    """Roundings of sums that only grow, of terms of very different sizes."""
    x = torch.rand(3, 30000).to(device, dtype)
    y = torch.logspace(-3, 3, 30000).expand(3, -1).to(device, dtype)
    check(x, y)


def test_each_may_have_a_dtype_of_its_own(name, device):
    x, y = rows_of(9, 300, torch.float64, device)
    for left in DTYPES:
        for right in DTYPES:
            if name != "triton" or torch.float64 not in (left, right):
                check(x.to(left), y.to(right))


def test_float64_in_either_is_no_work_for_triton(backend):
    pytest.importorskip("triton")
    x, y = rows_of(3, 4, torch.float64, "cpu")
    assert row_cosines(x.float(), y).dtype == torch.float64
    backend("triton")
    for left, right in ((x.float(), y), (x, y.float())):
        with pytest.raises(BackendError, match="cannot run cosine on cpu torch.float64"):
            row_cosines(left, right)


def test_autocast_and_autograd_do_not_reach_in(name, device):
    x, y = rows_of(5, 64, torch.float32, device)
    x.requires_grad_()
    with torch.autocast(device):
        found = row_cosines(x, y)
    assert not found.requires_grad
    assert torch.equal(found, row_cosines(x, y))


def test_the_operator_passes_opcheck(name, device):
    x, y = rows_of(7, 5, torch.float32, device)
    for valid in (None, torch.tensor([6, 0], device=device), torch.arange(0, device=device)):
        torch.library.opcheck(cosine_rows, (x, y, valid))
    torch.library.opcheck(cosine_rows, (x[:, ::2], y[:, ::2].bfloat16(), None))


def test_the_docstring_example_holds():
    result = doctest.testmod(op)
    assert (result.attempted > 0, result.failed) == (True, 0)


ROWS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("x", "y", "valid", "message"),
    [
        (ROWS, torch.ones(4, 2), None, r"same tokens.*\(3, 2\) and \(4, 2\)"),
        (ROWS[0], ROWS[0], None, r"got \(2,\) and \(2,\)"),
        (ROWS[:, :0], ROWS[:, :0], None, r"at least one column; got \(3, 0\)"),
        (ROWS.int(), ROWS, None, r"float32, float16, bfloat16 or float64.*int32"),
        (ROWS, ROWS.to("meta"), None, "on one device; got torch.float32 on cpu and .* on meta"),
        (ROWS, ROWS, torch.ones(3, dtype=torch.bool), r"valid must be \(rows,\) int64.*bool"),
        (ROWS, ROWS, torch.ones(3, 1, dtype=torch.int64), r"valid must be \(rows,\).*\(3, 1\)"),
        (ROWS, ROWS, torch.tensor([0, 3]), r"valid must lie in 0\.\.2; it spans 0\.\.3"),
        (ROWS, ROWS, torch.tensor([2, -1]), r"valid must lie in 0\.\.2; it spans -1\.\.2"),
    ],
)
def test_what_does_not_fit_is_named(x, y, valid, message):
    with pytest.raises(ValueError, match=message):
        row_cosines(x, y, valid)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor; got list"):
        row_cosines(ROWS, [[1.0]])


class Largest(TorchDispatchMode):
    """The most elements that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("valid", [None, torch.arange(90)], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_torch_version_copies_no_more_than_a_chunk(monkeypatch, dtype, valid):
    monkeypatch.setitem(op._CHUNK, "cpu", 320)
    x, y = rows_of(100, 33, dtype, "cpu")
    with Largest() as largest:
        found = backends._REGISTRY["cosine"]["torch"].run(x, y, valid)
    # of both, one after the other
    assert largest.elements <= 2 * 320
    expected = row_cosines_reference(x, y, valid)
    assert torch.allclose(found.double(), expected, rtol=0, atol=2.0**-24)
    # and a row of more than a chunk goes by itself
    wide = [part.reshape(5, 660) for part in (x, y)]
    with Largest() as largest:
        backends._REGISTRY["cosine"]["torch"].run(*wide, None)
    assert largest.elements <= 2 * 660
    assert cosine_bytes(100, 33, 4, "cpu") == 20 * 320
    assert cosine_bytes(5, 660, 8, "cpu") == 5 * 8 * 660
    assert cosine_bytes(2, 5, 2, "cpu") == 18 * 10

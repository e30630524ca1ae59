"""Cross moments and packing against their definitions, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from liar_testing import assert_close_rms

from liar_ext.ops import CrossMoments, cross, cross_reference, pack, pack_reference
from liar_ext.ops.cross import cross_accumulate
from liar_ext.ops.pack import pack_columns

BACKENDS = ["reference", "torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "some", "all off"]


def mask_of(kind: str, tokens: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    return torch.rand(tokens) < (0.6 if kind == "some" else -1.0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 3, 2), (37, 1, 66), (130, 70, 9)])
def test_cross_is_the_definition(backend, name, dtype, kind, tokens, rows, columns):
    if name == "triton":
        pytest.importorskip("triton")
    backend(name)
    x, y = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, columns).to(dtype)
    mask = mask_of(kind, tokens)
    if mask is not None and tokens:
        x[~mask], y[~mask] = float("nan"), float("inf")
    out = CrossMoments.zeros(rows, columns)
    out.cross += 0.5
    expected = cross_reference(x, y, mask)
    found = cross(x, y, mask, out)
    assert found is out
    assert int(found.count) == int(expected.count)
    # a float32 sum of T products errs by about sqrt(T) roundings; T is at most 130
    assert_close_rms(found.cross, expected.cross + 0.5, 2e-6)
    assert_close_rms(found.sum_x, expected.sum_x, 2e-6)
    assert_close_rms(found.sum_y, expected.sum_y, 2e-6)


def test_cross_adds_up_and_gives_the_covariance():
    x, y = torch.randn(90, 5) + 3.0, torch.randn(90, 4) - 1.0
    both = cross(x[:40], y[:40]) + cross(x[40:], y[40:])
    expected = (x - x.mean(0)).double().T @ (y - y.mean(0)).double() / 90
    assert_close_rms(both.covariance(), expected, 1e-5)
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(4, 5\) cannot be added"):
        both + cross(y, x)


def test_float64_goes_into_float64():
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    found = cross(x, y, out=CrossMoments.zeros(3, 2, dtype=torch.float64))
    assert_close_rms(found.cross, x.T @ y, 1e-15)
    with pytest.raises(ValueError, match=r"float32 for torch\.float64"):
        cross(x, y)


@pytest.mark.parametrize(
    ("x", "y", "mask", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), None, "same tokens"),
        (torch.ones(3, 2), torch.ones(3, 2).half(), None, "share a floating dtype"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(2), r"token_mask must be \(3,\)"),
    ],
)
def test_cross_names_what_does_not_fit(x, y, mask, message):
    with pytest.raises(ValueError, match=message):
        cross(x, y, mask)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("order", [None, [4, 0, 4, 12], []], ids=["all", "some", "none"])
def test_pack_is_the_definition(backend, name, dtype, kind, order):
    if name == "triton":
        pytest.importorskip("triton")
    backend(name)
    # neither the columns nor the rows are contiguous
    x = torch.randn(33, 26).to(dtype)[:, ::2]
    columns = None if order is None else torch.tensor(order, dtype=torch.int64)
    mask = mask_of(kind, 33)
    if mask is not None:
        x[~mask] = float("nan")
    before = x.clone()
    found = pack(x, mask, columns)
    assert torch.equal(found, pack_reference(x, mask, columns))
    found.fill_(7.0)
    assert torch.equal(x[0 if mask is None else mask], before[0 if mask is None else mask])


@pytest.mark.parametrize(
    ("mask", "columns", "message"),
    [
        (torch.ones(4), None, r"token_mask must be \(3,\)"),
        (None, torch.ones(2), r"columns must be \(m,\) int64"),
    ],
)
def test_pack_names_what_does_not_fit(mask, columns, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.ones(3, 2), mask, columns)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_operators_pass_opcheck(backend, name):
    if name == "triton":
        pytest.importorskip("triton")
    backend(name)
    x, y, mask = torch.randn(7, 3), torch.randn(7, 2), torch.rand(7) < 0.5
    out = CrossMoments.zeros(3, 2)
    torch.library.opcheck(
        cross_accumulate, (x, y, mask, out.cross, out.sum_x, out.sum_y, out.count)
    )
    for columns in (torch.tensor([2, 0]), None):
        torch.library.opcheck(pack_columns, (x, mask, columns))
        torch.library.opcheck(pack_columns, (x[:, ::2], None, None))

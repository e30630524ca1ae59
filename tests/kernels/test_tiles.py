"""The tile list: every wanted tile once, no other, and neighbours close together."""

from __future__ import annotations

import doctest

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from liar_ext.kernels import tiles
from liar_ext.kernels.runtime import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="runs kernels on CPU tensors")


@triton.jit
def list_kernel(
    out_ptr,
    count,
    row_tiles,
    column_tiles,
    triangle,
    GROUP: tl.constexpr,
    N: tl.constexpr,
):
    index = tl.arange(0, N)
    tile = tl.minimum(index, count - 1)
    row, column = tiles.tile_of(tile, row_tiles, column_tiles, triangle, GROUP)
    tl.store(out_ptr + index, row)
    tl.store(out_ptr + N + index, column)


@triton.jit
def row_kernel(out_ptr, index_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tiles.triangle_row(tl.load(index_ptr + at)))


def tile_list(row_tiles: int, column_tiles: int, triangle: bool, group: int) -> torch.Tensor:
    count = tiles.tile_count(row_tiles, column_tiles, triangle)
    size = triton.next_power_of_2(count)
    out = torch.full((2, size), -1, dtype=torch.int32)
    list_kernel[(1,)](out, count, row_tiles, column_tiles, int(triangle), group, size)
    return out[:, :count].T.to(torch.int64)


@pytest.mark.parametrize("group", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    ("row_tiles", "column_tiles"),
    [(1, 1), (2, 1), (2, 2), (5, 1), (6, 6), (7, 3), (9, 8), (17, 16), (23, 11), (40, 40)],
)
@pytest.mark.parametrize("triangle", [True, False], ids=["triangle", "rectangle"])
def test_every_wanted_tile_is_in_the_list_once(row_tiles, column_tiles, triangle, group):
    wanted = {
        (i, j)
        for i in range(row_tiles)
        for j in range(column_tiles)
        if not triangle or j <= i or i >= column_tiles
    }
    found = [tuple(pair) for pair in tile_list(row_tiles, column_tiles, triangle, group).tolist()]
    assert len(found) == len(wanted)
    assert set(found) == wanted
    if triangle:
        # a triangle needs no tile below it, so that a prefix of the list is its own tile list
        corner = tiles.tile_count(column_tiles, column_tiles, triangle=True)
        assert all(i < column_tiles for i, _ in found[:corner])


def test_a_rectangle_may_be_wider_than_high():
    found = tile_list(3, 7, False, 2)
    assert {tuple(pair) for pair in found.tolist()} == {(i, j) for i in range(3) for j in range(7)}


@pytest.mark.parametrize(("row_tiles", "column_tiles"), [(86, 86), (86, 43)])
def test_tiles_that_run_together_share_their_operands(row_tiles, column_tiles):
    """132 programs at a time, as on an H200: row by row they would load up to 133 operands."""
    found = tile_list(row_tiles, column_tiles, True, 8)
    loads = [len(wave.unique()) for wave in found.split(132)]
    assert sum(loads) / len(loads) <= 32
    # where a wave ends one band and begins the next
    assert max(loads) <= 56


def test_rows_of_large_indices_are_exact():
    """Both ends of a row and their neighbours, up to the largest that 32 bits hold: n = 5.9M."""
    rows = torch.cat([torch.arange(1, 2000), torch.arange(44000, 46339)])
    first = rows * (rows + 1) // 2
    index = torch.cat([first - 1, first, first + rows])
    expected = torch.cat([rows - 1, rows, rows]).to(torch.int32)
    size = triton.next_power_of_2(len(index))
    padded = torch.zeros(size, dtype=torch.int32)
    padded[: len(index)] = index.to(torch.int32)
    found = torch.full((size,), -1, dtype=torch.int32)
    row_kernel[(1,)](found, padded, size)
    assert torch.equal(found[: len(index)], expected)


def test_the_docstring_example_holds():
    result = doctest.testmod(tiles)
    assert (result.attempted > 0, result.failed) == (True, 0)

"""Which tiles of G the Hopper kernel computes, in which order, and which of them are split."""

from __future__ import annotations

import ctypes

import liar_cuda_host
import pytest
import torch

NO_COMPILER = liar_cuda_host.unavailable()


@pytest.fixture(scope="module")
def tiles():
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    library = liar_cuda_host.build(("tests/support/gram_tiles.cu",))
    size = ctypes.c_int64
    library.gram_tiles_plan.argtypes = [size, size, size, *[ctypes.c_int] * 4, ctypes.c_void_p]
    library.gram_tiles_list.argtypes = [size, size, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return library


def plan(tiles, columns, panel, tokens=32768, rows=128, tile=256, depth=64, teams=132):
    fields = (ctypes.c_int * 7)()
    count = tiles.gram_tiles_plan(columns, panel, tokens, rows, tile, depth, teams, fields)
    names = ("row_tiles", "column_tiles", "rows_per_step", "steps", "whole", "rest", "parts")
    return count, dict(zip(names, fields, strict=True))


@pytest.mark.parametrize(("rows", "tile"), [(128, 128), (128, 256), (256, 256)])
@pytest.mark.parametrize(
    ("columns", "panel"),
    [(1, 1), (128, 128), (129, 5), (2048, 2048), (2049, 1300), (5000, 300), (14336, 7168)],
)
def test_the_tile_list_covers_the_lower_triangle_of_the_panel_once(
    tiles, columns, panel, rows, tile
):
    count, _ = plan(tiles, columns, panel, rows=rows, tile=tile)
    found = torch.empty(count, 2, dtype=torch.int32)
    tiles.gram_tiles_list(columns, panel, rows, tile, found.data_ptr())
    expected = {
        (row, column)
        for row in range(-(-columns // rows))
        for column in range(-(-panel // tile))
        if column * tile < (row + 1) * rows
    }
    listed = [tuple(pair) for pair in found.tolist()]
    assert len(listed) == len(expected)
    assert set(listed) == expected


def test_tiles_of_one_turn_read_few_columns_of_a_wide_x(tiles):
    """132 tiles of 128 × 256 need at least 4160 columns (16 rows of tiles by 8.25)."""
    count, _ = plan(tiles, 28672, 28672)
    found = torch.empty(count, 2, dtype=torch.int32)
    tiles.gram_tiles_list(28672, 28672, 128, 256, found.data_ptr())
    widths = []
    for turn in found[: count // 132 * 132].view(-1, 132, 2):
        rows, columns = turn.unbind(1)
        widths.append(128 * len(rows.unique()) + 256 * len(columns.unique()))
    assert sum(widths) / len(widths) < 1.3 * 4160


@pytest.mark.parametrize(
    ("columns", "panel", "tokens", "rest", "parts"),
    [
        # 272 tiles on 132 blocks: 8 are left, 16 blocks each
        (4096, 4096, 32768, 8, 16),
        (11008, 11008, 32768, 44, 3),
        # 116 are left: a turn of their own
        (28672, 28672, 32768, 0, 1),
        # parts have at least 512 tokens
        (128, 128, 32768, 1, 64),
        (128, 128, 1023, 0, 1),
        (128, 128, 1024, 1, 2),
    ],
)
def test_which_tiles_are_split(tiles, columns, panel, tokens, rest, parts):
    count, made = plan(tiles, columns, panel, tokens)
    assert (made["rest"], made["parts"]) == (rest, parts)
    assert made["whole"] + made["rest"] == count
    assert made["rest"] * made["parts"] <= 132

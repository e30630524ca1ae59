"""The list of output tiles that every product kernel works through, and what is done in a tile.

A product `out = Σ x yᵀ` (rows: columns of x; columns: columns of y) is cut into square tiles. For a
Gram matrix y is x, the triangle of the panel comes first and then the rectangle of the rows below
it; a cross moment is the rectangle alone.

    column tiles ->  0 1 2        triangle: 0..5, rectangle: 6..11; the dropped block and the
    row tiles 0      x            upper triangle have no tiles, which is the whole saving
              1      x x
              2      x x x
              3      x x x   <-  dropped columns as rows
              4      x x x

Tiles are numbered in bands of GROUP rows, and in a band column by column: programs that run at the
same time then share their operands in the L2 cache (of 132 tiles, 8 rows and 17 columns, instead
of one row and 132 columns).
"""

from __future__ import annotations

import triton
import triton.language as tl


def tile_count(row_tiles: int, column_tiles: int, triangle: bool) -> int:
    """Tiles in the list; with `triangle` the first `column_tiles` rows are one.

    Example:
        >>> tile_count(5, 3, triangle=True), tile_count(5, 3, triangle=False)
        (12, 15)
    """
    if not triangle:
        return row_tiles * column_tiles
    return column_tiles * (column_tiles + 1) // 2 + (row_tiles - column_tiles) * column_tiles


@triton.jit
def triangle_row(index):
    """The largest row with `row (row + 1) / 2 <= index`."""
    # a float32 square root is off by less than one for every triangle that int32 can number: one
    # correction each way makes it exact
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _in_rectangle(index, rows, columns, GROUP: tl.constexpr):
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = index - first * columns
    return first + inside % height, inside // height


@triton.jit
def _in_triangle(index, rows, GROUP: tl.constexpr):
    # a band begins with a row, so the row-by-row number finds the band
    first = triangle_row(index) // GROUP * GROUP
    height = tl.maximum(tl.minimum(rows - first, GROUP), 1)
    inside = index - first * (first + 1) // 2
    # left of its own small triangle, a band is a rectangle
    corner = tl.maximum(inside - first * height, 0)
    row = triangle_row(corner)
    left = inside < first * height
    return (
        first + tl.where(left, inside % height, row),
        tl.where(left, inside // height, first + corner - row * (row + 1) // 2),
    )


@triton.jit
def tile_of(index, row_tiles, column_tiles, triangle, GROUP: tl.constexpr):
    """Row and column tile of a linear index below `tile_count`; `triangle` is 0 or 1."""
    # the rows that are a triangle, and the tiles in it
    above = triangle * column_tiles
    corner = above * (above + 1) // 2
    # each formula gets an index of its own range, also when the other one is taken
    row, column = _in_triangle(tl.minimum(index, tl.maximum(corner - 1, 0)), above, GROUP)
    below, beside = _in_rectangle(
        tl.maximum(index - corner, 0), tl.maximum(row_tiles - above, 1), column_tiles, GROUP
    )
    inside = index < corner
    return tl.where(inside, row, above + below), tl.where(inside, column, beside)


@triton.jit
def _dot(left, right, acc, UPCAST: tl.constexpr, FRESH: tl.constexpr):
    if UPCAST:
        # the interpreter multiplies the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if FRESH:
        # without the argument (which means something to float8 only) the compiler folds the
        # addition that follows into the accumulator of the tensor core, where it is truncated
        return tl.dot(left, right, max_num_imprecise_acc=right.shape[0])
    else:
        return tl.dot(left, right, acc)


@triton.jit
def multiply(
    xh, xm, xl, yh, ym, yl, acc, PLANES: tl.constexpr, UPCAST: tl.constexpr, FRESH: tl.constexpr
):
    """`x y` of one step, added to `acc`, or on its own with FRESH; x is (BLOCK, BLOCK_T) already.

    PLANES = 3: x = xh + xm + xl in bfloat16 and six of the nine products; the other three are below
    2^-24 of the result. Small ones first: a tensor core truncates at the size of its running sum.
    """
    if PLANES == 3:
        acc = _dot(xl, yh, acc, UPCAST, FRESH)
        acc = _dot(xh, yl, acc, UPCAST, False)
        acc = _dot(xm, ym, acc, UPCAST, False)
        acc = _dot(xm, yh, acc, UPCAST, False)
        acc = _dot(xh, ym, acc, UPCAST, False)
        return _dot(xh, yh, acc, UPCAST, False)
    else:
        return _dot(xh, yh, acc, UPCAST, FRESH)


@triton.jit
def _add(out_ptr, value, i, j, rows, columns, out_stride, on_diagonal):
    at = out_ptr + i.to(tl.int64)[:, None] * out_stride + j[None, :]
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    # two branches: a mask with the diagonal in it takes the vector stores from every tile
    if on_diagonal:
        inside = inside & (i[:, None] >= j[None, :])
        tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)
    else:
        tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _halves(value):
    """The left and the right half of the columns."""
    parts = tl.reshape(value, (value.shape[0], 2, value.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def add_to_tile(out_ptr, value, i, first, rows, columns, out_stride, on_diagonal):
    """`out[i, first:first + BLOCK] += value` inside `(rows, columns)`; `on_diagonal`, not above it.

    In quarters: addresses and old values of a whole tile at once do not fit into registers beside
    it where `columns` or `out_stride` is odd and nothing can be loaded in vectors.
    """
    QUARTER: tl.constexpr = value.shape[1] // 4
    j = first + tl.arange(0, QUARTER)
    left, right = _halves(value)
    a, b = _halves(left)
    c, d = _halves(right)
    _add(out_ptr, a, i, j, rows, columns, out_stride, on_diagonal)
    _add(out_ptr, b, i, j + QUARTER, rows, columns, out_stride, on_diagonal)
    _add(out_ptr, c, i, j + 2 * QUARTER, rows, columns, out_stride, on_diagonal)
    _add(out_ptr, d, i, j + 3 * QUARTER, rows, columns, out_stride, on_diagonal)

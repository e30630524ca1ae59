"""Moments: the sufficient statistics of least squares over the columns of one Site."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# rows of G that are gathered at a time: 29 MB of float32 at 28672 columns
GATHER_ROWS = 256
# columns, or rows of a block, of what is made from Moments a part at a time (`spans`)
BLOCK = 512


@dataclass
class Moments:
    """Count, sum and Gram matrix of the rows of `X` (T, n): `N`, `s = Σ x`, `G = Σ x xᵀ`.

    Additive: the Moments of two sets of tokens are `a + b`, whichever chunk, rank or file they
    came from.

    Attributes:
        count: 0-dim int64. Tokens accumulated (masked tokens are not counted).
        sum: (n,) float64. Column sums; float64 because `n` numbers cost nothing and centring
            subtracts `s sᵀ/N` from `G`, which cancels when the mean is large.
        gram: (n, s) float32 or float64. The first `s` columns of the **lower triangle** of `G` in
            the column order `order`: entries with row ≥ column are defined, the rest is
            unspecified. `s = n` is the whole triangle; `s < n` leaves out the dropped × dropped
            block, which no repair needs.
        order: (n,) int64 permutation `[S | M]`, or None for the natural order, also where the kept
            columns are the first ones: nothing has to be gathered then. Row `i` of `gram` belongs
            to column `order[i]` of `X`; `sum` stays in the natural order.
        mirrored: the upper triangle holds a copy of the lower one. Whatever accumulates into
            `gram` sets it to False.
    """

    count: Tensor
    sum: Tensor
    gram: Tensor
    order: Tensor | None = None
    mirrored: bool = False
    # the order that was found to be a permutation; looking again would wait for the device
    checked: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def zeros(
        cls,
        columns: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep: Tensor | None = None,
    ) -> Moments:
        """Empty Moments over `columns` columns; `keep` (s,) restricts them to `G_SS` and `G_MS`."""
        order = None
        panel = columns
        if keep is not None:
            keep = keep.to(device=device, dtype=torch.int64)
            panel = keep.numel()
            if not torch.equal(keep, torch.arange(panel, device=device)):
                dropped = torch.ones(columns, dtype=torch.bool, device=device)
                dropped[keep] = False
                order = torch.cat([keep, dropped.nonzero().flatten()])
        return cls(
            count=torch.zeros((), dtype=torch.int64, device=device),
            sum=torch.zeros(columns, dtype=torch.float64, device=device),
            gram=torch.zeros(columns, panel, dtype=dtype, device=device),
            order=order,
        )

    @property
    def columns(self) -> int:
        return self.sum.numel()

    @property
    def complete(self) -> bool:
        """True when the whole triangle was accumulated, not only the kept panel."""
        return self.gram.shape[1] == self.columns

    def __add__(self, other: Moments) -> Moments:
        self._same_layout(other)
        return Moments(
            self.count + other.count, self.sum + other.sum, self.gram + other.gram, self.order
        )

    def __sub__(self, other: Moments) -> Moments:
        """The Moments of the tokens of `self` that are not in `other`, which has some of them.

        The Gram matrix is rounded at the size of the larger one.
        """
        self._same_layout(other)
        return Moments(
            self.count - other.count, self.sum - other.sum, self.gram - other.gram, self.order
        )

    def _same_layout(self, other: Moments) -> None:
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"moments of shapes {tuple(self.gram.shape)} and {tuple(other.gram.shape)} "
                "cannot be added"
            )
        same_order = (self.order is None) == (other.order is None) and (
            self.order is None or bool(torch.equal(self.order, other.order))  # type: ignore[arg-type]
        )
        if not same_order:
            raise ValueError("moments with different column orders cannot be added")

    def mean(self) -> Tensor:
        """`μ = s/N`, (n,) float64, natural order."""
        return self.sum / self.count.clamp(min=1)

    def second(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The block `G[rows, cols]/N`, uncentred, float64.

        Args:
            rows, cols: int64 column indices in the natural order.
        Raises:
            ValueError: the block needs dropped × dropped entries that were not accumulated.
        """
        self._mirror()
        if self.order is not None:
            position = torch.empty_like(self.order)
            position[self.order] = torch.arange(self.columns, device=self.order.device)
            rows, cols = position[rows], position[cols]
        panel = self.gram.shape[1]
        count = self.count.clamp(min=1)
        if self.complete or not bool((cols >= panel).any()):
            return self._gather(rows, cols).div_(count)
        if not bool((rows >= panel).any()):
            return self._gather(cols, rows).div_(count).T
        raise ValueError("this block needs dropped × dropped entries, which are not there")

    def _gather(self, rows: Tensor, cols: Tensor) -> Tensor:
        """`gram[rows][:, cols]` in float64 by blocks of rows (`gather_bytes`).

        At the widths of a 70B model a gather of all rows first would be 1.6 GB of float32.
        """
        block = torch.empty(
            rows.numel(), cols.numel(), dtype=torch.float64, device=self.gram.device
        )
        for start in range(0, rows.numel(), GATHER_ROWS):
            part = rows[start : start + GATHER_ROWS]
            block[start : start + GATHER_ROWS] = self.gram[part][:, cols]
        return block

    def _mirror(self) -> None:
        """Fill the upper triangle of the square part from the lower one, in place, by blocks."""
        if self.mirrored:
            return
        panel, block = self.gram.shape[1], 1024
        for start in range(0, panel, block):
            stop = min(start + block, panel)
            corner = self.gram[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            self.gram[:start, start:stop] = self.gram[start:stop, :start].T
        self.mirrored = True

    def diagonal(self) -> Tensor:
        """Mean squares `E[x_j²]`, (n,) float64, natural order. Needs the whole triangle."""
        if not self.complete:
            raise ValueError("the diagonal needs the whole triangle")
        squares = self.gram.diagonal().double() / self.count.clamp(min=1)
        if self.order is None:
            return squares
        natural = torch.empty_like(squares)
        natural[self.order] = squares
        return natural

    def variance(self) -> Tensor:
        """Centred variances `C_jj`, (n,) float64, clamped at 0, natural order."""
        return (self.diagonal() - self.mean() ** 2).clamp(min=0)


def spans(start: int, stop: int) -> list[tuple[int, int]]:
    """`start:stop` in parts of up to `BLOCK`."""
    return [(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]


def gather_bytes(rows: int, cols: int, panel: int) -> int:
    """Most bytes that `Moments.second` holds for a block (rows, cols), the block included.

    8 rows cols, and float32 copies of `GATHER_ROWS` rows of G, (·, panel), and of their columns.
    """
    return 8 * rows * cols + 4 * min(rows, GATHER_ROWS) * (panel + cols)


@dataclass
class ColumnMoments:
    """Count, sum and sum of squares of each column: what a criterion needs when no Gram is due.

    Attributes:
        count: 0-dim int64; sum, squares: (n,) float64.
    """

    count: Tensor
    sum: Tensor
    squares: Tensor

    @classmethod
    def zeros(cls, columns: int, device: torch.device | str = "cpu") -> ColumnMoments:
        return cls(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(columns, dtype=torch.float64, device=device),
            torch.zeros(columns, dtype=torch.float64, device=device),
        )

    def __sub__(self, other: ColumnMoments) -> ColumnMoments:
        """Of the tokens of `self` that are not in `other`, which has some of them."""
        return ColumnMoments(
            self.count - other.count, self.sum - other.sum, self.squares - other.squares
        )

    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Accumulate the valid rows of `x` (T, n)."""
        rows = x if token_mask is None else x[token_mask.bool()]
        self.count += rows.shape[0]
        # squares rounded to float32 have lost a variance beside a mean of 1e4 deviations
        for part in rows.split(BLOCK):
            wide = part.double()
            self.sum += wide.sum(0)
            self.squares += wide.square().sum(0)

    def mean(self) -> Tensor:
        return self.sum / self.count.clamp(min=1)

    def diagonal(self) -> Tensor:
        return self.squares / self.count.clamp(min=1)

    def variance(self) -> Tensor:
        return (self.diagonal() - self.mean() ** 2).clamp(min=0)


def column_bytes(tokens: int, columns: int) -> int:
    """Most bytes that `ColumnMoments.add` holds: a block of rows in float64, and its squares."""
    return 16 * min(tokens, BLOCK) * columns

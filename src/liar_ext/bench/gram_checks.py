"""The cases of `liar bench gram`, and how right a result is: before any of them is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from liar_ext.ops import Moments

# columns of the square that is compared with float64: the whole would take longer than the rest
CHECKED = 384
# side of the tiles in which the work of an extraction is counted
TILE = 128
# an error that is infinite or NaN, for JSON has neither
WRONG = 1e30
# columns of float64 copies at a time
BLOCK = 1024


@dataclass(frozen=True)
class Case:
    """One way to call Gram accumulation.

    Attributes:
        kind: the whole `triangle`; `keep`, the kept columns' panel only; `mask`, the triangle with
            a token mask that leaves out one token, so that the work stays the same; `product`, the
            triangle without column sums, which no user can ask for.
        fraction: of the columns that are kept.
        order: `prefix`, x has the kept columns first already, as weights reordered to [S | M] make
            it, and nothing is gathered; `scattered`, they are anywhere.
    """

    kind: Literal["triangle", "keep", "mask", "product"] = "triangle"
    fraction: float = 1.0
    order: Literal["prefix", "scattered"] = "prefix"

    @property
    def name(self) -> str:
        return f"keep {self.fraction:g} {self.order}" if self.kind == "keep" else self.kind

    def panel(self, columns: int) -> int:
        return max(1, round(self.fraction * columns))

    def flops(self, tokens: int, columns: int) -> int:
        """Useful work: the lower triangle of the kept columns, and the panel below it."""
        kept = self.panel(columns)
        return (kept * kept + 2 * (columns - kept) * kept) * tokens

    def tile_share(self, columns: int) -> float:
        """Its tiles over those of the whole triangle."""
        rows, panel = (-(-size // TILE) for size in (columns, self.panel(columns)))
        own = panel * (panel + 1) // 2 + (rows - panel) * panel
        return own / (rows * (rows + 1) // 2)

    def token_mask(self, x: Tensor) -> Tensor | None:
        if self.kind != "mask":
            return None
        mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        mask[-1] = False
        return mask

    def moments(self, x: Tensor) -> Moments:
        """Empty Moments of this case."""
        columns, panel = x.shape[1], self.panel(x.shape[1])
        if self.kind == "keep" and self.order == "prefix":
            return Moments(
                count=torch.zeros((), dtype=torch.int64, device=x.device),
                sum=torch.zeros(columns, dtype=torch.float64, device=x.device),
                gram=torch.zeros(columns, panel, device=x.device),
            )
        keep = None
        if self.kind == "keep":
            generator = torch.Generator().manual_seed(0)
            keep = torch.randperm(columns, generator=generator)[:panel].sort().values
        return Moments.zeros(columns, device=x.device, keep=keep)


def bound(tokens: int) -> float:
    """A float32 sum of T products errs by about √T roundings of 2^-24; four times that is wrong.

    Sums have a mean of a tenth of a standard deviation here, which magnifies their relative error.
    """
    return 4 * 2.0**-24 * (2 + tokens**0.5)


def moments_error(x: Tensor, token_mask: Tensor | None, moments: Moments) -> float:
    """Relative rms error of part of G and of the sums, against float64."""
    rows = x if token_mask is None else x[token_mask]
    picked, part = _part(rows, moments.order)
    own = picked if moments.order is None else moments.order[picked]
    return max(
        _gram_error(picked, part, moments.gram),
        _relative(moments.sum[own], part.sum(0)),
    )


def gram_error(x: Tensor, gram: Tensor) -> float:
    """The same for a G (n, n) without sums."""
    return _gram_error(*_part(x, None), gram)


def _gram_error(picked: Tensor, part: Tensor, gram: Tensor) -> float:
    panel = picked[picked < gram.shape[1]]
    expected = part.T @ part[:, : panel.numel()]
    actual = gram[picked][:, panel].double()
    return _relative(actual.tril(), expected.tril())


def _part(x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Some row numbers of G, ascending, and their columns of x in float64."""
    generator = torch.Generator().manual_seed(1)
    picked = torch.randperm(x.shape[1], generator=generator)[:CHECKED].sort().values.to(x.device)
    return picked, x[:, picked if order is None else order[picked]].double()


def _relative(actual: Tensor, expected: Tensor) -> float:
    value = ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()
    return value if value < WRONG else WRONG


def diagonal_bias(x: Tensor, accumulate: Callable[[Tensor], Tensor]) -> float:
    """Mean relative error, with its sign, of the diagonal of G on the magnitudes of x.

    Roundings to nearest cancel in it. What is left is one-sided: tensor cores truncate their
    running sum, and the terms of a diagonal entry are all positive.
    """
    positive = x.abs()
    actual = accumulate(positive).diagonal().double()
    total = 0.0
    for start in range(0, x.shape[1], BLOCK):
        expected = positive[:, start : start + BLOCK].double().square().sum(0)
        part = actual[start : start + BLOCK]
        total += ((part - expected) / expected.clamp(min=1e-300)).sum().item()
    return total / x.shape[1]

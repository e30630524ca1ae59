"""Merged convolutions refitted in closed form: least squares from their own input patches.

Without the activations inside it, a merged convolution computes something else than the dense
segment did. It has the freedom of a whole kernel, so the best one is asked for:

    min over W, b of  Σ over positions ‖W p + b − y‖² + λ N ‖W − W₀‖²

with p the patch of its present input that a position looks at, y what stands in front of the
activation there in the dense network, less the present shortcut where one is added after; W₀ what
merging gives. So it aims at the dense network's activations, whatever the segments before it have
done to its input. Centred sums are enough: `W = W₀ + Cov(r, p) (Cov(p) + λI)⁻¹` with r the error of
W₀, and b makes the means equal. λ is chosen on images that are held out of the fit, of which one
more candidate is to leave the convolution as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from liar_ext import ops
from liar_ext.convolution.algebra import Conv, padded
from liar_ext.errors import InputError

# λ relative to the mean variance of a patch's entries
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
# every fourth batch chooses λ
HELD_OUT = 4


@dataclass
class PatchSums:
    """Sums over positions of patches p (s,) and errors r (m,), for b systems at a time: one of a
    full convolution (s = in k², m = out), one for each channel of a depthwise one (s = k², m = 1).

    Attributes:
        count: positions. p, r: (b, s), (b, m). pp, pr: (b, s, s), (b, s, m). rr: (b, m), squares.
            All float64.
    """

    count: int
    p: Tensor
    r: Tensor
    pp: Tensor
    pr: Tensor
    rr: Tensor

    def __add__(self, other: PatchSums) -> PatchSums:
        return PatchSums(
            self.count + other.count,
            *(self.p + other.p, self.r + other.r, self.pp + other.pp),
            *(self.pr + other.pr, self.rr + other.rr),
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """Cov(p) (b, s, s) and Cov(p, r) (b, s, m); constant columns are zero."""
        p, r = self.p / self.count, self.r / self.count
        matrix = self.pp / self.count - p[:, :, None] * p[:, None, :]
        right = self.pr / self.count - p[:, :, None] * r[:, None, :]
        squares = self.pp.diagonal(dim1=1, dim2=2) / self.count
        # below the rounding of its own mean square a variance is none
        dead = matrix.diagonal(dim1=1, dim2=2) <= 64 * torch.finfo(torch.float64).eps * squares
        matrix = matrix.masked_fill(dead[:, :, None] | dead[:, None, :], 0.0)
        return matrix, right.masked_fill(dead[:, :, None], 0.0)

    def error(self, change: Tensor, shift: Tensor) -> float:
        """Mean over positions of `Σ (r − changeᵀ p − shift)²`: change (b, s, m), shift (b, m)."""
        wanted = self.rr.sum() / self.count
        pr = self.pr / self.count
        pp = self.pp / self.count
        p, r = self.p / self.count, self.r / self.count
        made = (change * (pp @ change)).sum() - 2 * (change * pr).sum()
        moved = (shift * (shift - 2 * r + 2 * torch.einsum("bsm,bs->bm", change, p))).sum()
        return float(wanted + made + moved)


class Spread:
    """The variance of what is aimed at, summed over channels: what errors are relative to."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, y: Tensor) -> None:
        """y (n, channels, h, w)."""
        wide = y.double().transpose(0, 1).flatten(1)
        self._count += wide.shape[1]
        self._sum = self._sum + wide.sum(1)
        self._squares = self._squares + wide.square().sum(1)

    def variance(self) -> float:
        each = torch.as_tensor(self._squares) / self._count
        return float((each - (torch.as_tensor(self._sum) / self._count) ** 2).sum())


def patch_sums(
    conv: Conv, x: Tensor, y: Tensor, limit: int, generator: torch.Generator
) -> PatchSums:
    """The sums of a batch.

    Args:
        conv: as it is, on the device of x (n, in, h, w) and y (n, out, h', w').
        limit: positions of an image at most; drawn where there are more.
    """
    patches = functional.unfold(
        padded(x.double(), conv.padding, conv.same, conv.stride), conv.kernel, stride=conv.stride
    )
    wanted = y.double().flatten(2)
    if patches.shape[2] != wanted.shape[2]:
        raise ValueError(f"{patches.shape[2]} patches for {wanted.shape[2]} positions")
    if patches.shape[2] > limit:
        chosen = torch.randperm(patches.shape[2], generator=generator)[:limit].to(x.device)
        patches, wanted = patches[:, :, chosen], wanted[:, :, chosen]
    if conv.depthwise:
        own = patches.unflatten(1, (conv.outputs, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        weight = conv.weight.flatten(1)
        errors = wanted.permute(1, 0, 2).flatten(1) - torch.einsum("bts,bs->bt", own, weight)
        errors = (errors - conv.bias[:, None])[:, :, None]
        return PatchSums(
            own.shape[1],
            *(own.sum(1), errors.sum(1), own.mT @ own, own.mT @ errors, errors.square().sum(1)),
        )
    rows = patches.transpose(1, 2).flatten(0, 1)
    errors = wanted.transpose(1, 2).flatten(0, 1) - rows @ conv.weight.flatten(1).T - conv.bias
    columns, outputs = rows.shape[1], errors.shape[1]
    empty = ops.Moments.zeros(columns, dtype=torch.float64, device=x.device)
    pairs = ops.CrossMoments.zeros(columns, outputs, dtype=torch.float64, device=x.device)
    moments, cross = ops.gram(rows, out=empty), ops.cross(rows, errors, out=pairs)
    every = torch.arange(columns, device=x.device)
    squares = moments.second(every, every) * len(rows)
    return PatchSums(
        *(len(rows), moments.sum[None], cross.sum_y[None], squares[None], cross.cross[None]),
        errors.square().sum(0)[None],
    )


def solved(sums: PatchSums, ridge: float) -> tuple[Tensor, Tensor]:
    """change (b, s, m) and shift (b, m) of least squares with a ridge relative to the variance."""
    matrix, right = sums.centred()
    unit = matrix.diagonal(dim1=1, dim2=2).mean(1)
    found = ops.solve(
        *(matrix, right, ridge), unit=unit.tolist(), moments_dtype=torch.float64
    ).solution
    p, r = sums.p / sums.count, sums.r / sums.count
    return found, r - torch.einsum("bsm,bs->bm", found, p)


def refit(
    conv: Conv, pairs: Iterable[tuple[Tensor, Tensor]], *, images: int, patches: int, seed: int
) -> tuple[Conv, dict[str, Any]]:
    """The convolution that least squares makes of one, and what it found.

    Args:
        conv: float64, on the device of the pairs.
        pairs: inputs (n, in, h, w) and what it should make of them (n, out, h', w'), batch by
            batch; read once.
        images: in all of them; patches: positions that are used at most, of all images.
    Returns:
        a convolution of the same shape; `ridge` (None: left as it is), `error_before` and `error`,
        mean squared errors over the variance of y on the held-out batches, and `positions`.
    Raises:
        InputError: the activations are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = max(1, patches // max(images, 1))
    parts: list[PatchSums | None] = [None, None]
    spread = Spread()
    for number, (x, y) in enumerate(pairs):
        sums = patch_sums(conv, x, y, limit, generator)
        which = 1 if number % HELD_OUT == HELD_OUT - 1 else 0
        before = parts[which]
        parts[which] = sums if before is None else before + sums
        spread.add(y)
    fitted, held_out = parts
    if fitted is None:
        raise ValueError("there is no batch to fit to")
    if not bool(fitted.pp.sum().isfinite() & fitted.rr.sum().isfinite()):
        raise InputError("activations are NaN or infinite; check the checkpoint and the images")
    variance = max(spread.variance(), 1e-300)
    measured = fitted if held_out is None else held_out
    zero = torch.zeros_like(fitted.pr), torch.zeros_like(fitted.r)
    tried = {ridge: measured.error(*solved(fitted, ridge)) for ridge in RIDGES}
    before_error = measured.error(*zero)
    best = min(tried, key=lambda ridge: tried[ridge])
    facts = {
        "ridge": best,
        "error_before": before_error / variance,
        "error": tried[best] / variance,
        "positions": fitted.count + (0 if held_out is None else held_out.count),
    }
    if not tried[best] < before_error:
        return conv, {**facts, "ridge": None, "error": facts["error_before"]}
    change, shift = solved(fitted if held_out is None else fitted + held_out, best)
    return changed(conv, change, shift), facts


def changed(conv: Conv, change: Tensor, shift: Tensor) -> Conv:
    """A convolution with a solution (b, s, m), (b, m) added to it."""
    rows = change[:, :, 0] if conv.depthwise else change[0].T
    weight = conv.weight + rows.reshape(conv.weight.shape)
    return replace(conv, weight=weight, bias=conv.bias + shift.flatten())


def refit_reference(conv: Conv, x: Tensor, y: Tensor, ridge: float) -> Conv:
    """The definition, on raw patches of a full convolution, in float64 with `lstsq`."""
    patches = functional.unfold(
        padded(x.double(), conv.padding, conv.same, conv.stride), conv.kernel, stride=conv.stride
    )
    rows = patches.transpose(1, 2).flatten(0, 1)
    weight = conv.weight.flatten(1)
    wanted = y.double().flatten(2).transpose(1, 2).flatten(0, 1) - rows @ weight.T - conv.bias
    p, r = rows.mean(0), wanted.mean(0)
    strength = ridge * (rows - p).square().mean(0).mean() * len(rows)
    prior = strength.sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
    left = torch.cat((rows - p, prior))
    right = torch.cat((wanted - r, torch.zeros(rows.shape[1], len(weight), dtype=torch.float64)))
    change = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return changed(conv, change[None], (r - p @ change)[None])

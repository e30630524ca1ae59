"""A scaled system, its factor, and what follows from them: solution, eigenvalues, residual.

The factor comes from a library or from the project's own blocked Cholesky; the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from liar_ext.ops import backends
from liar_ext.ops.attempt import Attempt
from liar_ext.ops.blocked import substitute
from liar_ext.ops.precision import full_precision

# refinement of a float32 factorisation stops when residual times condition, a bound of the forward
# error, is below this, or when the residual no longer falls
REFINED = 1e-8
REFINEMENT_STEPS = 5
# power iteration, so from below: six steps on eight vectors came to 0.89 to 1.0 of the true value
# for five spectra at n = 1500
POWER_STEPS = 6
PROBES = 8
# with more right-hand sides than this the residual is taken of that many random combinations
RESIDUAL_COLUMNS = 8
# columns of a diagonal block that is inverted for substitutions by products
BLOCK = 512


class Factor(Protocol):
    """`L` of `Ã = L Lᵀ` for a batch."""

    @property
    def info(self) -> Tensor: ...

    @property
    def pivot(self) -> Tensor: ...

    def substitute(self, right: Tensor) -> Tensor:
        """`Ã⁻¹ right` for (b, s, r), in the dtype of the factor; `right` may be overwritten."""

    def substitute_few(self, right: Tensor) -> Tensor:
        """The same for a handful of columns, which are left as they are."""


@dataclass(frozen=True)
class Scaled:
    """`Ã = d (A + λI) d` with a unit diagonal; dead columns become columns of the identity.

    Attributes:
        matrix: (b, s, s) float64, A as given. scale: (b, s, 1), d, 0 for dead columns.
        rest: (b, s, 1): what `d A d` lacks on the diagonal.
    """

    matrix: Tensor
    scale: Tensor
    rest: Tensor

    @classmethod
    def of(cls, matrix: Tensor, strength: Tensor) -> Scaled:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        # NaN where A + λI is negative: it has to reach the factorisation
        scale = torch.where(diagonal == 0, 0.0, (diagonal + strength[:, None]).rsqrt())
        return cls(matrix, scale[..., None], (1.0 - scale.square() * diagonal)[..., None])

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Ã itself, (b, s, s)."""
        scaled = self.matrix * self.scale
        scaled *= self.scale.mT
        # one, or NaN
        scaled.diagonal(dim1=-2, dim2=-1).copy_(1.0 + 0.0 * self.scale[..., 0])
        return scaled.to(dtype)

    def times(self, vectors: Tensor) -> Tensor:
        """`Ã v` for (b, s, k) without a copy of Ã."""
        return self.scale * (self.matrix @ (self.scale * vectors)) + self.rest * vectors


@dataclass
class LibraryFactor:
    """Cholesky by `torch.linalg`: MKL, or cuSOLVER.

    Attributes:
        products: substitute by products with inverted diagonal blocks, not by the library's
            triangular solve. On a GPU always: of the 24.9 ms of 12 × 1536² with 1536 columns on an
            H200, 15.1 were triangular solves, for 8.7e10 operations that its float64 products do
            in 1.4 ms.
    """

    lower: Tensor
    info: Tensor
    pivot: Tensor
    products: bool
    _inverses: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, scaled: Tensor, products: bool | None = None) -> LibraryFactor:
        """Factor (b, s, s) in place: its memory holds L, or nothing of use after a failure.

        A factor in memory of its own would be the third matrix beside A and Ã.
        """
        # columns are contiguous to the library, and of a symmetric matrix rows are columns
        lower = scaled.mT
        info = torch.empty(len(scaled), dtype=torch.int32, device=scaled.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        pivot = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1).double()
        return cls(lower, info, pivot, scaled.is_cuda if products is None else products)

    def substitute(self, right: Tensor) -> Tensor:
        if self.products:
            return substitute(self.lower, self.inverses(), right, overwrite=True, correct=True)
        _substitute(self.lower, right)
        return right

    def substitute_few(self, right: Tensor) -> Tensor:
        """By products too: a library spends as long on 8 columns as on hundreds."""
        if self.lower.shape[-1] <= BLOCK:
            return self.substitute(right.clone())
        return substitute(self.lower, self.inverses(), right, correct=True)

    def inverses(self) -> list[Tensor]:
        """Of the diagonal blocks of L, lower triangular; made once."""
        for start in range(0, 0 if self._inverses else self.lower.shape[-1], BLOCK):
            corner = self.lower[:, start : start + BLOCK, start : start + BLOCK]
            eye = torch.eye(corner.shape[1], dtype=corner.dtype, device=corner.device)
            inverse = torch.linalg.solve_triangular(corner, eye.expand_as(corner), upper=False)
            self._inverses.append(inverse)
        return self._inverses


def _substitute(lower: Tensor, right: Tensor) -> None:
    """`(L Lᵀ)⁻¹ right` in place of `right`, (b, s, r) contiguous."""
    # from the right, on the transpose: rows of `right` are columns to the library, no copies
    rows = right.mT
    torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, out=rows)
    torch.linalg.solve_triangular(lower, rows, upper=False, left=False, out=rows)


def finish(
    system: Scaled,
    factor: Factor,
    right: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> Attempt:
    """Substitution, refinement of a float32 factor, P and the diagnostics."""
    target = torch.empty_like(right, memory_format=torch.contiguous_format)
    torch.mul(right, system.scale, out=target)
    start = probes(right.shape[1], PROBES, right).expand(right.shape[0], -1, -1)
    if working == torch.float64:
        # what the residual needs of the target, which makes room for the solution; and before the
        # estimates, so that a GPU is busy while their many small steps are queued
        mixed = _mixed(target)
        inner = factor.substitute(target)
    largest = largest_eigenvalue(system.times, start)
    smallest = 1.0 / largest_eigenvalue(
        lambda v: factor.substitute_few(v.to(working)).double(), start
    )
    if working == torch.float64:
        sample = _mixed(inner)
        error = _relative(system.times(sample) - mixed, sample, mixed, largest)
    else:
        inner = factor.substitute(target.to(working)).double()
        inner, error = _refine(system, factor, inner, target, largest, smallest)
    del target
    solution = inner.mul_(system.scale).contiguous()
    if mean_kept is None or mean_dropped is None:
        shift = right.new_zeros(right.shape[0], right.shape[2])
    else:
        shift = torch.sub(mean_dropped, (solution.mT @ mean_kept[..., None])[..., 0]).contiguous()
    return Attempt(solution, shift, factor.info, factor.pivot, largest, smallest, error)


def probes(rows: int, columns: int, like: Tensor) -> Tensor:
    """(1, rows, columns) of pseudo-random numbers in ±½: the same on every device and every call.

    A hash by sines and not a generator: filling from a CPU generator would wait for the device.
    """
    row = torch.arange(1, rows + 1, dtype=like.dtype, device=like.device)[:, None]
    column = torch.arange(1, columns + 1, dtype=like.dtype, device=like.device)
    return (
        ((row * 12.9898 + column * 78.233).sin() * 43758.5453)
        .remainder(1.0)
        .sub(0.5)[None]
        .contiguous()
    )


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Largest eigenvalue, (b,), of a batch of symmetric operators: power iteration from below."""
    vectors = start
    for _ in range(POWER_STEPS):
        vectors = apply(vectors / vectors.norm(dim=1, keepdim=True))
    return vectors.norm(dim=1).amax(-1)


def _mixed(columns: Tensor) -> Tensor:
    """Random combinations of the columns of (b, s, r), the same ones each time; a few: a copy."""
    if columns.shape[2] <= RESIDUAL_COLUMNS:
        return columns.clone()
    return columns @ probes(columns.shape[2], RESIDUAL_COLUMNS, columns)


def _relative(residual: Tensor, inner: Tensor, target: Tensor, largest: Tensor) -> Tensor:
    norm = [value.flatten(1).norm(dim=1) for value in (residual, inner, target)]
    return norm[0] / (largest * norm[1] + norm[2]).clamp(min=1e-300)


def _refine(
    system: Scaled,
    factor: Factor,
    inner: Tensor,
    target: Tensor,
    largest: Tensor,
    smallest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Iterative refinement: a step is kept, system by system, only if the residual fell."""
    enough = REFINED * smallest / largest
    residual = target - system.times(inner)
    error = _relative(residual, inner, target, largest)
    for _ in range(REFINEMENT_STEPS):
        moved = inner + factor.substitute(residual.float()).double()
        rest = target - system.times(moved)
        found = _relative(rest, moved, target, largest)
        fell = found < error
        inner = torch.where(fell[:, None, None], moved, inner)
        residual = torch.where(fell[:, None, None], rest, residual)
        error = torch.where(fell, found, error)
        # the one place that waits for the device; a graph under capture cannot, and takes all steps
        capturing = inner.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not bool((fell & (error > enough)).any()):
            break
    return inner, error


@backends.register("solve", "torch")
def _torch(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> Attempt:
    """The libraries behind `torch.linalg`: any size, any device."""
    system = Scaled.of(matrix, strength)
    with full_precision():
        factor = LibraryFactor.of(system.tensor(working))
        return finish(system, factor, right, mean_kept, mean_dropped, working)


def spread(system: Scaled) -> tuple[float, float]:
    """Largest and smallest eigenvalue of one Ã, as estimated for a solve; 0 if it has no factor."""
    start = probes(system.matrix.shape[1], PROBES, system.matrix)
    largest = float(largest_eigenvalue(system.times, start))
    factor = LibraryFactor.of(system.tensor(torch.float64))
    if int(factor.info) != 0:
        return largest, 0.0
    return largest, 1.0 / float(largest_eigenvalue(factor.substitute_few, start))

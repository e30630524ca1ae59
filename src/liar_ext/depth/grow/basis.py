"""One left basis for a matrix of all layers, and each layer's coefficients in it (LESA).

With `W = [W_1 … W_L] = U S Vᵀ`, block i of Vᵀ, called V_i (r, in), has `W_i = (U S) V_i`: all
layers are one basis with coefficients of their own. W (out, L · in) has the columns of all layers
together, and its SVD is not needed: U and S follow from `G = Σ W_i W_iᵀ = U S² Uᵀ`, (out, out),
which takes one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedBasis:
    """Attributes:
    left: U (out, r), float64, orthonormal columns, the largest singular value first. Of each
        column the entry of largest magnitude is positive: an SVD leaves the sign open.
    scale: S (r,), float64, positive.
    """

    left: Tensor
    scale: Tensor

    @property
    def rank(self) -> int:
        return self.scale.numel()

    def matrix(self, coefficients: Tensor) -> Tensor:
        """`(U S) V`, (out, in) float64, of V (r, in)."""
        return (self.left * self.scale) @ coefficients.double()


def shared_basis(
    read: Callable[[int], Tensor],
    layers: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[SharedBasis, Tensor]:
    """The basis of a matrix in these layers, and the coefficients of each, (layers, r, in).

    G is summed in float64: its condition is that of W squared, so that in float32 directions below
    3e-4 of the largest singular value would be noise; in float64 those below 1e-8. Products of
    bfloat16 weights are exact either way. Directions with an eigenvalue below `out · 2⁻⁵²` of the
    largest are rounding: they are left out, and W_i is the same to 1e-6 of its largest singular
    value (4096 rows). S is not the root of the eigenvalues but the norm of the rows of
    `Uᵀ W`, which holds for small ones too; so every row of V, over all layers, has length 1.

    Args:
        read: layer -> W_i (out, in), called twice for each.
        layers: which; all of one shape.
        device: where it is computed, and where the coefficients stay; dtype: theirs.
    Source:
        LESA (Yang et al., 2025, arXiv 2502.13794); the route over G is ours.
    """
    gram = gram_of((read(layer) for layer in layers), device)
    left = _eigenvectors(gram)
    del gram
    coefficients = torch.empty(0, device=device)
    square = torch.zeros(left.shape[1], dtype=torch.float64, device=device)
    for place, layer in enumerate(layers):
        found = left.T @ read(layer).to(device, torch.float64)
        if place == 0:
            coefficients = torch.empty(len(layers), *found.shape, dtype=dtype, device=device)
        coefficients[place] = found
        square += found.square().sum(1)
    scale = square.sqrt()
    coefficients /= scale[:, None].to(dtype)
    return SharedBasis(left, scale), coefficients


def gram_of(matrices: Iterable[Tensor], device: torch.device) -> Tensor:
    """`Σ W_i W_iᵀ` (out, out), float64."""
    total: Tensor | None = None
    for matrix in matrices:
        wide = matrix.to(device, torch.float64)
        if total is None:
            total = wide @ wide.T
        else:
            total.addmm_(wide, wide.T)
    if total is None:
        raise ValueError("no matrices")
    return total


def _eigenvectors(gram: Tensor) -> Tensor:
    """Those of eigenvalues that are not rounding, (out, r), the largest first."""
    values, vectors = torch.linalg.eigh(gram)
    least = values[-1] * len(values) * torch.finfo(torch.float64).eps
    # eigh sorts upwards
    found = vectors[:, values > least].flip(1)
    return found * signs(found)


def signs(left: Tensor) -> Tensor:
    """±1 for each column, that of its entry of largest magnitude."""
    largest = left.abs().argmax(0, keepdim=True)
    return left.gather(0, largest).sign()


def basis_reference(matrices: Sequence[Tensor]) -> tuple[SharedBasis, Tensor]:
    """The definition: a float64 SVD of `[W_1 … W_L]`, whole.

    Args:
        matrices: W_i (out, in). The signs are those of `SharedBasis`.
    """
    wide = [matrix.double() for matrix in matrices]
    left, scale, right = torch.linalg.svd(torch.cat(wide, 1), full_matrices=False)
    largest = scale[0] * (len(left) * torch.finfo(torch.float64).eps) ** 0.5
    kept = scale > largest
    sign = signs(left)[:, kept]
    blocks = (right[kept] * sign.T).split(wide[0].shape[1], 1)
    return SharedBasis(left[:, kept] * sign, scale[kept]), torch.stack(blocks)

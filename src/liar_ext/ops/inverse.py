"""The inverse of a ridge system in the memory of the system itself.

At 28672 columns a float64 matrix is 6.6 GB: the system, its scaled copy and an inverse beside them
were three of these. `Ã = L Lᵀ` and `Ã⁻¹ = L⁻ᵀ L⁻¹` need no more than the one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.factor import BLOCK, PROBES, LibraryFactor, Scaled, largest_eigenvalue, probes


def inverse_(matrix: Tensor, strength: float, floor: float) -> Tensor:
    """`(A + λI)⁻¹` (s, s) float64 in place of A, dead rows and columns zero.

    Args:
        matrix: A (s, s) float64, both triangles, contiguous; what it holds after an error is of no
            use.
    Raises:
        NumericalError: it does not exist, or is smaller than the rounding `floor` lets it be known.
    """
    scale = Scaled.of(matrix[None], matrix.new_tensor([strength])).scale
    scaled = matrix[None].mul_(scale).mul_(scale.mT)
    # one, or NaN
    scaled.diagonal(dim1=-2, dim2=-1).copy_(1.0 + 0.0 * scale[..., 0])
    factor = LibraryFactor.of(scaled)
    if int(factor.info) != 0:
        raise NumericalError(f"no inverse: not positive definite at pivot {int(factor.info)}")
    start = probes(matrix.shape[0], PROBES, matrix)
    smallest = 1.0 / float(largest_eigenvalue(factor.substitute_few, start))
    if not smallest > floor:
        raise NumericalError(
            f"no usable inverse: smallest eigenvalue {smallest:.1e}, rounding {floor:.1e}"
        )
    lower = factor.lower[0]
    del factor
    if lower.is_cuda:
        # cuSOLVER would solve for all columns of the identity beside a copy of L
        from_factor_(lower)
    else:
        torch.cholesky_inverse(lower, out=lower)
    # of a symmetric matrix rows are columns: the memory is that of `matrix`, row by row
    return lower.mT.mul_(scale[0]).mul_(scale[0].mT)


def from_factor_(lower: Tensor, block: int = BLOCK) -> Tensor:
    """`L⁻ᵀ L⁻¹` (s, s), both triangles, in place of L by blocks, after LAPACK's trtri and lauum.

    Args:
        lower: L (s, s), zeros above the diagonal.
    """
    size = len(lower)
    spans = [(start, min(start + block, size)) for start in range(0, size, block)]
    # X = L⁻¹: with X of what is behind, X[k, j] = −X[k, k] L[k, j] X[j, j]
    for start, stop in reversed(spans):
        corner = lower[start:stop, start:stop]
        eye = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner.copy_(torch.linalg.solve_triangular(corner, eye, upper=False))
        below = lower[stop:, start:stop]
        below.copy_((lower[stop:, stop:] @ below).neg_() @ corner)
    # XᵀX, row by row of blocks: what is below is still X
    for start, stop in spans:
        rows = lower[start:stop, :stop]
        column = lower[start:, start:stop].clone()
        rows.copy_(column[: stop - start].T @ rows)
        rows.addmm_(column[stop - start :].T, lower[stop:, :stop])
        lower[:start, start:stop] = rows[:, :start].T
        corner = rows[:, start:]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return lower


def inverse_flops(columns: int) -> int:
    """Of `inverse_`: a factor, `n³/3`, and the inverse of it, `2n³/3`."""
    return columns**3


def inverse_bytes(columns: int) -> int:
    """Most bytes that `interpolate.inverse_moments` holds, its result included.

    The matrix, and two panels of the products that invert it on a GPU; inverted diagonal blocks of
    its factor, and what it is gathered from, are less.
    """
    return 8 * columns**2 + 16 * min(columns, BLOCK) * columns

"""Ridge systems with known properties for the tests of the solvers."""

from __future__ import annotations

import torch
from torch import Tensor


def covariances(batch: int, size: int, tokens: int | None = None) -> Tensor:
    """(b, s, s) float64 covariance-like matrices with column scales from 0.1 to 10."""
    x = torch.randn(batch, tokens or 2 * size + 3, size, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, size, dtype=torch.float64)
    return x.mT @ x / x.shape[1]


def conditioned(batch: int, size: int, condition: float) -> Tensor:
    """(b, s, s) float64 matrices of unit diagonal whose condition is about `condition`."""
    q, _ = torch.linalg.qr(torch.randn(batch, size, size, dtype=torch.float64))
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    matrix = (q * spectrum) @ q.mT
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    matrix = matrix * scale[..., None] * scale[..., None, :]
    return (matrix + matrix.mT) / 2


def lower_only(matrix: Tensor) -> Tensor:
    """The matrix with NaN above its diagonal: what must not be read."""
    above = torch.ones(matrix.shape[-2:], dtype=torch.bool).triu(1)
    return matrix.masked_fill(above, torch.nan)

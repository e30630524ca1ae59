"""Ridge systems whose solution is known: B is made from Z, so no other solver is the judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# a low-rank part with the spread of a diagonal: costs s²·rank where a Gram matrix costs s²·T
RANK = 32
# largest over smallest entry of that diagonal
SPREAD = 1e2
RIDGE = 1e-4
# Householder reflections that hide a spectrum: any number keeps it exactly
REFLECTIONS = 8


@dataclass(frozen=True)
class Systems:
    """`(A + λI) Z = B` for b systems of s kept and r dropped columns, all float64.

    Attributes:
        matrix: (b, s, s) A. ridge: relative to its mean diagonal. ridged: A + λI.
        right: (b, s, r). solution: (b, s, r).
        mean_kept, mean_dropped: (b, s), (b, r). shift: (b, r), P.
    """

    matrix: Tensor
    ridge: float
    ridged: Tensor
    right: Tensor
    solution: Tensor
    mean_kept: Tensor
    mean_dropped: Tensor
    shift: Tensor

    @property
    def flops(self) -> float:
        """Of a Cholesky factorisation and two substitutions."""
        batch, kept, dropped = self.right.shape
        return batch * (kept**3 / 3 + 2.0 * kept**2 * dropped)

    def forward_error(self, solution: Tensor) -> float:
        """Worst of the batch: `‖Z − Z₀‖ / ‖Z₀‖`."""
        return _worst(solution.double() - self.solution, self.solution)

    def shift_error(self, shift: Tensor) -> float:
        return _worst(shift - self.shift, self.shift)

    def backward_error(self, solution: Tensor) -> float:
        """Worst of the batch: `‖(A+λI)Z − B‖ / (‖A+λI‖‖Z‖ + ‖B‖)`, Frobenius."""
        worst = 0.0
        # one system at a time: a copy of B is as large as B
        for matrix, z, right in zip(self.ridged, solution.double(), self.right, strict=True):
            scale = matrix.norm() * z.norm() + right.norm()
            worst = max(worst, _finite(((matrix @ z - right).norm() / scale).item()))
        return worst


def systems(batch: int, kept: int, dropped: int, device: torch.device) -> Systems:
    """Well conditioned, like the moments of activations with a ridge: for timing."""
    generator = torch.Generator(device=device).manual_seed(kept)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    low = normal(batch, kept, RANK)
    matrix = low @ low.mT / RANK
    decades = torch.linspace(0, 1, kept, dtype=torch.float64, device=device)
    matrix.diagonal(dim1=-2, dim2=-1).add_(SPREAD**decades)
    return _complete(matrix, RIDGE, normal(batch, kept, dropped))


def conditioned(condition: float, kept: int, dropped: int, device: torch.device) -> Systems:
    """One system with eigenvalues log-spaced over `condition`, without a ridge."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    exponents = torch.linspace(0, 1, kept, dtype=torch.float64, device=device)
    matrix = torch.diag(condition**-exponents)
    for _ in range(REFLECTIONS):
        v = normal(kept)
        v /= v.norm()
        matrix -= 2 * torch.outer(v, v @ matrix)
        matrix -= 2 * torch.outer(matrix @ v, v)
    matrix = (matrix + matrix.T) / 2
    return _complete(matrix[None], 0.0, normal(1, kept, dropped))


def _complete(matrix: Tensor, ridge: float, solution: Tensor) -> Systems:
    ridged = matrix.clone()
    diagonal = ridged.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True)
    batch, kept, dropped = solution.shape
    mean_kept = torch.linspace(-1, 1, kept, dtype=torch.float64, device=matrix.device)
    mean_kept = mean_kept.expand(batch, kept).contiguous()
    mean_dropped = torch.ones(batch, dropped, dtype=torch.float64, device=matrix.device)
    shift = mean_dropped - (solution.mT @ mean_kept[..., None])[..., 0]
    right = ridged @ solution
    return Systems(matrix, ridge, ridged, right, solution, mean_kept, mean_dropped, shift)


def _worst(difference: Tensor, expected: Tensor) -> float:
    norms = difference.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return _finite(norms.max().item())


def _finite(value: float) -> float:
    # JSON has neither infinity nor NaN
    return value if value < 1e30 else 1e30

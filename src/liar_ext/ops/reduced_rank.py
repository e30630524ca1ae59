"""What a linear map of low rank can take of an error, from moments.

    min over D of rank r:  ‖E − X Dᵀ‖² + λ‖D‖²  =  ‖E‖² − Σ_{i≤r} σ_i²
    σ_i: singular values of EᵀX (XᵀX + λI)^(−1/2)

(reduced-rank regression, Izenman 1975): the least-squares map of E on X, whose singular values are
taken in the metric of X's Gram matrix. `E` (T, m) are errors of outputs, `X` (T, n) inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.errors import NumericalError


def recoverable_reference(error: Tensor, x: Tensor, ridge: float) -> Tensor:
    """The σ_i² by the definition: singular values of what of E is in the span of X, (min(m, n),)
    float64, falling.

    Args:
        error: (T, m); x: (T, n); ridge: λ over the mean of the diagonal of XᵀX.
    """
    error, x = error.double(), x.double()
    columns = x.shape[1]
    weight = ridge * x.square().sum() / columns
    # a ridge is as many further tokens, whose error is zero
    inputs = torch.cat([x, weight.sqrt() * torch.eye(columns, dtype=torch.float64)])
    wanted = torch.cat([error, error.new_zeros(columns, error.shape[1])])
    basis, _ = torch.linalg.qr(inputs)
    found = torch.linalg.svdvals(basis.T @ wanted).square()
    return found[: min(error.shape[1], columns)]


def recoverable(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The same from moments.

    Args:
        gram: (n, n) `XᵀX`, its lower triangle; cross: (m, n) `EᵀX`.
    Returns:
        (min(m, n),) float64, falling, zero where there is nothing to take.
    Raises:
        NumericalError: no ridge up to the mean of the diagonal makes the Gram matrix definite.
    """
    lower = gram.double().tril()
    whole = lower + lower.tril(-1).T
    diagonal = whole.diagonal()
    mean = diagonal.mean()
    least = min(cross.shape)
    if not bool(mean > 0):
        return whole.new_zeros(least)
    step = ridge
    while True:
        shifted = whole + step * mean * torch.eye(len(whole), dtype=whole.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            break
        if step >= 1:
            raise NumericalError("the Gram matrix of a consumer's inputs cannot be factorised")
        step = max(step * 10, 1e-8)
    half = torch.linalg.solve_triangular(factor, cross.double().T, upper=False)
    # of the smaller of the two products
    square = half.T @ half if half.shape[1] <= half.shape[0] else half @ half.T
    return torch.linalg.eigvalsh(square).flip(0).clamp(min=0)[:least]

"""The one assertion helper of the numerical tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_close_rms(actual: Tensor, expected: Tensor, ratio: float) -> None:
    """Fail unless `rms(actual - expected) <= ratio * rms(expected)`.

    A ratio over the whole tensor, not element by element: elements near zero keep their absolute
    rounding error and say nothing about a kernel. NaN, infinities and other shapes always fail. An
    expected tensor of zeros must be met exactly.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert torch.isfinite(expected).all(), "the expected tensor is not finite: a broken test"
    broken = int((~torch.isfinite(actual)).sum())
    assert broken == 0, f"{broken} of {actual.numel()} elements are NaN or infinite"
    if actual.numel() == 0:
        return
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    at = tuple(
        int(i) for i in torch.unravel_index((actual - expected).abs().argmax(), actual.shape)
    )
    worst = f"worst at {at}: {actual[at].item():.6g} for {expected[at].item():.6g}"
    assert error <= ratio * scale, (
        f"rms error ratio {error / max(scale, 1e-300):.3g} > {ratio:.3g}; {worst}"
    )


def covariance(size: int, condition: float, seed: int = 0) -> Tensor:
    """Symmetric (size, size) float64 with a log-spaced spectrum from 1 down to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    made = (basis * spectrum) @ basis.T
    return (made + made.T) / 2

"""The self-tests of `backends`: one small case for each op, against its float64 definition.

Each returns the relative error and its bound; NaN never passes. Sizes are multiples of 16 plus an
edge, so that a test compiles the kernels that real widths use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOKENS, COLUMNS, KEPT = 300, 208, 144


def gram_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """The triangle, then the panel of a Selection with a token mask."""
    from liar_ext.ops.gram import gram_reference
    from liar_ext.ops.moments import Moments

    x, mask = _activations(COLUMNS, device, dtype)
    keep = torch.arange(COLUMNS, device=device).flip(0)[:KEPT]
    worst = 0.0
    for valid, kept in ((None, None), (mask, keep)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = Moments.zeros(COLUMNS, dtype=wide, device=device, keep=kept)
        run(x, valid, found.order, found.gram, found.sum, found.count)
        true = gram_reference(x, valid, kept)
        worst = _worst(worst, found.gram.tril(), true.gram.tril())
        worst = _worst(worst, found.sum, true.sum)
        worst = _worst(worst, found.count.double(), true.count.double())
    return worst, 1e-5


def cross_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """A product of two different widths with a token mask."""
    from liar_ext.ops.cross import CrossMoments, cross_reference

    x, mask = _activations(COLUMNS, device, dtype)
    y = x[:, :KEPT].flip(0).contiguous()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = CrossMoments.zeros(COLUMNS, KEPT, dtype=wide, device=device)
    run(x, y, mask, found.cross, found.sum_x, found.sum_y)
    true = cross_reference(x, y, mask)
    worst = _worst(0.0, found.cross, true.cross)
    worst = _worst(worst, found.sum_x, true.sum_x)
    return _worst(worst, found.sum_y, true.sum_y), 1e-5


def pack_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Reversed columns with a token mask: moved, so without any error."""
    from liar_ext.ops.pack import pack_reference

    x, mask = _activations(COLUMNS, device, dtype)
    columns = torch.arange(COLUMNS, device=device).flip(0)
    return _worst(0.0, run(x, mask, columns), pack_reference(x, mask, columns)), 0.0


def solve_error(
    run: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Batches of 96 (one block each) and 208 (blocked), with means."""
    from liar_ext.ops.attempt import Attempt, attempt_reference

    worst = 0.0
    for size in (96, COLUMNS):
        x, _ = _activations(size, device, torch.float64)
        matrix = (x.T @ x / TOKENS).expand(3, size, size).contiguous()
        strength = torch.linspace(0.1, 1.0, 3, dtype=torch.float64, device=device)
        right, mean = matrix[:, :, :40].flip(1).contiguous(), matrix[:, 0].contiguous()
        dropped = mean[:, :40].contiguous()
        found = Attempt(*run(matrix, right, strength, mean, dropped, dtype))
        true = attempt_reference(matrix, right, strength, mean, dropped)
        worst = _worst(worst, found.solution, true.solution)
        worst = _worst(worst, found.shift, true.shift)
        worst = worst if not bool(found.info.any()) else float("inf")
        # an estimate, within a factor of three
        factor = float((found.smallest / true.smallest).log().abs().amax().exp())
        worst = worst if factor <= 3.0 else float("inf")
    return worst, 1e-6


def _activations(columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Correlated columns with means, and a mask; no generator's state is touched."""
    row = torch.arange(1, TOKENS + 1, dtype=torch.float64)[:, None]
    column = torch.arange(1, columns + 1, dtype=torch.float64)
    noise = ((row * 12.9898 + column * 78.233).sin() * 43758.5453).remainder(1.0)
    x = (noise - 0.3 + 0.2 * (row * 0.7).sin()).to(device=device, dtype=dtype)
    return x, (torch.arange(TOKENS) % 3 != 1).to(device)


def _worst(before: float, found: Tensor, true: Tensor) -> float:
    error = (found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300)
    value = float(error)
    return max(before, value) if value == value else float("inf")

"""How fast this machine is at what a compression does, by its own kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from liar_ext.costs import SitePlan, residual_flops, solve_flops
from liar_ext.ops.gram import gram
from liar_ext.ops.interpolate import Repair, repair
from liar_ext.ops.moments import Moments
from liar_ext.ops.residual import residual_energies
from liar_ext.recipe import Recipe

# for each of four rates, beside the first call; about two seconds together
MEASURE_SECONDS = 0.3
# columns, and tokens of a Gram: as large as that allows, because rates grow with them
MEASURE_SIZE = {"cpu": (1536, 4096), "cuda": (8192, 16384)}


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of each phase by its own kernels, on this machine.

    The forward pass is a matmul in `dtype`; statistics are a Gram of values in `dtype`; a solve is
    a repair that keeps half of the columns, and the residual is that of its result.
    """
    n, tokens = MEASURE_SIZE[device.type]
    # zeros draw less power than data, and a GPU would clock higher for them
    x = torch.randn(tokens, n, device=device).to(dtype)
    square = x[:n].contiguous()
    moments = Moments.zeros(n, device=device)
    weight = torch.randn(n // 2, n, device=device).to(dtype)
    keep, drop = torch.arange(n, device=device).split(n // 2)
    found: list[Repair] = []

    def solve() -> None:
        found[:] = [repair(moments, weight, keep, drop, ridge=1e-2)]

    def residual() -> None:
        residual_energies(moments, weight, keep, found[0].weight, found[0].shift)

    own = SitePlan(0, "", "", n, n // 2, n, n // 2, n // 2, n)
    with torch.no_grad():
        return {
            "forward": _rate(device, 2 * n**3, lambda: torch.mm(square, square)),
            "gram": _rate(device, tokens * n**2, lambda: gram(x, out=moments)),
            "solve": _rate(device, solve_flops(own, Recipe()), solve),
            "residual": _rate(device, residual_flops(own), residual),
        }


def _rate(device: torch.device, flops: int, call: Callable[[], object]) -> float:
    """By the fastest call: whatever else runs now need not run then."""
    call()  # the first call pays for threads and libraries
    best, start = float("inf"), time.perf_counter()
    while (began := time.perf_counter()) - start < MEASURE_SECONDS:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return flops / best

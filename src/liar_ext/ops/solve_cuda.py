"""The CUDA implementation of `solve`: which kernel or library a system of each size goes to."""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.ops import _native_solve, backends, blocked, self_test
from liar_ext.ops.attempt import Attempt
from liar_ext.ops.factor import LibraryFactor, Scaled, finish
from liar_ext.ops.precision import full_precision

# above this a library's own blocked Cholesky has enough work in one matrix
BLOCKED = 1024


def _no_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return _native_solve.panel_unavailable(device, dtype)


@backends.register("solve", "cuda", _no_cuda, self_test=self_test.solve_error)
def _cuda(
    matrix: Tensor,
    right: Tensor,
    strength: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    working: torch.dtype,
) -> Attempt:
    """One block for each system up to 128 rows, our panels up to 1024, the library above."""
    size = matrix.shape[1]
    if _native_solve.unavailable(matrix.device, size, working) is None:
        return _native_solve.solve_small(matrix, right, strength, mean_kept, mean_dropped, working)
    system = Scaled.of(matrix, strength)
    scaled = system.tensor(working)
    # a process that allows TF32 would lose the float32 factor its refinement
    with full_precision():
        factor = blocked.factor(scaled) if size <= BLOCKED else LibraryFactor.of(scaled)
        return finish(system, factor, right, mean_kept, mean_dropped, working)

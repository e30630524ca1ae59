"""Ridge solve of a batch, with a check on its own accuracy and a ladder that is never silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.attempt import attempt
from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.ladder import Numbers, Standing, all_good, climb_all, table_of
from liar_ext.ops.precision import slow_float64

Precision = Literal["auto", "float64", "float32"]


@dataclass(frozen=True)
class Solved:
    """Attributes:

    solution: (b, s, r) float64, Z with zero rows for dead columns.
    shift: (b, r) float64, `P = μ_M − Zᵀ μ_S`; zeros where no means were given.
    diagnostics: one for each system.
    """

    solution: Tensor
    shift: Tensor
    diagnostics: Sequence[Diagnostics]


def solve(
    matrix: Tensor,
    right: Tensor,
    ridge: float,
    *,
    unit: Sequence[float] | None = None,
    mean_kept: Tensor | None = None,
    mean_dropped: Tensor | None = None,
    moments_dtype: torch.dtype = torch.float32,
    floor: float | None = None,
    precision: Precision = "auto",
) -> Solved:
    """Solve `(A + λI) Z = B`, `λ = ridge · unit`, for a batch of positive semidefinite A.

    λ is added before the Jacobi scaling, so it is the ridge of the definition (`attempt`). A result
    is used only if the factorisation exists, the smallest eigenvalue of the scaled matrix is above
    the rounding of the moments, and the backward error is small, also when the condition magnifies
    it; else float32 goes to float64, and float64 raises the ridge, at least tenfold and to 1 at
    most. Each such step is a line of that system's Diagnostics; the other systems of the batch are
    not touched by it.

    Args:
        matrix: (b, s, s) float64, both triangles; a column with a diagonal of 0 is dead.
        right: (b, s, r) float64.
        ridge: relative to `unit`; ≥ 0.
        unit: for each system what the ridge is relative to, the mean diagonal of its live columns
            when None or 0.
        mean_kept, mean_dropped: (b, s) and (b, r) float64, for P.
        moments_dtype: precision the matrix was accumulated in.
        floor: its rounding, relative to a unit diagonal; None for the epsilon of `moments_dtype`.
        precision: `float64`; `float32` with refinement by float64 residuals (falls back to
            float64); `auto` is float64 except on GPUs where float64 is slow.
    Raises:
        ValueError: shapes or dtypes do not fit together, or ridge or unit is negative or no number.
        NumericalError: one of the systems could not be solved; it says which.

    Example:
        >>> matrix = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
        >>> right = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
        >>> solve(matrix, right, 0.0).solution.flatten()
        tensor([1., 1.], dtype=torch.float64)
    """
    if matrix.ndim != 3 or right.ndim != 3:
        raise ValueError(
            f"matrix must be (batch, s, s) and right (batch, s, r); "
            f"got {tuple(matrix.shape)} and {tuple(right.shape)}"
        )
    batch, size = matrix.shape[:2]
    if batch == 0:
        raise ValueError("matrix holds no system: its batch is empty")
    if unit is not None and len(unit) != batch:
        raise ValueError(f"unit must have one number for each of {batch} systems; got {len(unit)}")
    check_not_negative("ridge", ridge)
    for value in unit or ():
        check_not_negative("unit", value)
    floor = torch.finfo(moments_dtype).eps if floor is None else floor
    working = working_dtype(precision, matrix.device)
    diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
    live = diagonal.count_nonzero(-1)
    units = diagonal.sum(-1) / live.clamp(min=1)
    if unit is not None and len(set(unit)) == 1:
        # no copy from the host, which would wait for the device
        units = torch.full_like(units, unit[0]) if unit[0] > 0 else units
    elif unit is not None:
        given = units.new_tensor(unit)
        units = torch.where(given > 0, given, units)
    first = attempt(matrix, right, ridge * units, mean_kept, mean_dropped, working)
    # here the host waits for the device, once for all systems
    table = table_of(first, size - live, units)
    if all_good(table[:5], floor):
        return Solved(first.solution, first.shift, Records(table, ridge, working))
    failed: dict[int, Standing] = {}
    for i, (*numbers, dead, own) in enumerate(table.T.tolist()):
        found = Numbers(*numbers)
        if (reason := found.reason(floor)) is None:
            continue
        name = f"system {i} of {batch} ({size}²)"
        if not bool((matrix[i].sum() + right[i].sum()).isfinite()):
            raise NumericalError(f"{name} holds NaN or infinite values")
        failed[i] = Standing(name, ridge, own, int(dead), working, ridge)
        failed[i].climb(found, reason, floor)
    every = len(failed) == batch
    # all of them are no copy; and a solution that is to be repeated is as large as the right sides
    which = slice(None) if every else list(failed)
    solution, shift = (None, None) if every else (first.solution, first.shift)
    del first
    climbed = climb_all(
        matrix[which],
        right[which],
        None if mean_kept is None else mean_kept[which],
        None if mean_dropped is None else mean_dropped[which],
        list(failed.values()),
        floor,
    )
    if solution is None or shift is None:
        solution, shift = climbed.solution, climbed.shift
    else:
        solution[which], shift[which] = climbed.solution, climbed.shift
    again = dict(zip(failed, climbed.diagnostics, strict=True))
    return Solved(solution, shift, Records(table, ridge, working, again))


class Records(Sequence[Diagnostics]):
    """The Diagnostics of a batch, each made when it is asked for: 256 take longer than a solve.

    `table` is that of `ladder.table_of` with the dead columns and the units; `again`, those of
    systems that a later attempt solved.
    """

    def __init__(
        self,
        table: Tensor,
        ridge: float,
        working: torch.dtype,
        again: Mapping[int, Diagnostics] | None = None,
    ) -> None:
        self._table, self._ridge, self._working = table, ridge, working
        self._again = again or {}

    def __len__(self) -> int:
        return self._table.shape[1]

    @overload
    def __getitem__(self, index: int) -> Diagnostics: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Diagnostics, ...]: ...
    def __getitem__(self, index: int | slice) -> Diagnostics | tuple[Diagnostics, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        at = range(len(self))[index]
        if at in self._again:
            return self._again[at]
        *numbers, dead, own = self._table[:, at].tolist()
        standing = Standing("", self._ridge, own, int(dead), self._working, self._ridge)
        return standing.diagnostics(Numbers(*numbers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError for what is no finite number ≥ 0."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number, 0 or more; got {value}")


def working_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The precision of the factorisation that `precision` means on `device`."""
    named = {"float64": torch.float64, "float32": torch.float32}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise ValueError(f"precision must be auto, float64 or float32; got {precision!r}")
    return torch.float32 if slow_float64(device) else torch.float64

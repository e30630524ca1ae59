"""What is done about a system that an attempt did not solve well enough: never silent, and ends.

float32 goes to float64, and float64 raises the ridge, at least tenfold and to 1 at most. Each such
step is a line of that system's Diagnostics; the other systems of a batch are not touched by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from liar_ext.errors import NumericalError
from liar_ext.ops.attempt import Attempt, attempt
from liar_ext.ops.diagnostics import Diagnostics

LADDER_STEPS = 8
# normwise backward error accepted from a float64 factorisation: 1e-16 · n with n ≤ 3e4, and slack
BACKWARD_TOLERANCE = 1e-10
# times the condition it estimates the forward error of Z̃ = Z/d, each kept column in its own
# deviations; float64 keeps that below this up to conditions of about 1e10
FORWARD_TOLERANCE = 1e-6
# a ridge of the mean variance leaves nothing of a repair: the ladder ends there
LARGEST_RIDGE = 1.0


class Numbers(NamedTuple):
    """What an attempt says of one system; `ops.attempt.Attempt` has the meanings."""

    info: float
    pivot: float
    largest: float
    smallest: float
    error: float

    @property
    def condition(self) -> float:
        return max(self.largest / self.smallest, 1.0) if self.smallest else float("inf")

    def reason(self, floor: float) -> str | None:
        """Why this is not good enough, or None. Written so that a NaN is a reason."""
        if self.info != 0:
            return f"not positive definite at pivot {int(self.info)}"
        if not self.smallest > floor:
            return (
                f"smallest eigenvalue {self.smallest:.1e} is below the rounding {floor:.1e} "
                "of the moments"
            )
        if not self.error <= BACKWARD_TOLERANCE:
            return f"backward error {self.error:.1e} above {BACKWARD_TOLERANCE:.0e}"
        if not self.error * self.condition <= FORWARD_TOLERANCE:
            return f"backward error {self.error:.1e} at a condition of {self.condition:.1e}"
        return None


def all_good(numbers: Tensor, floor: float) -> bool:
    """Whether `Numbers.reason` is None for each column of (5, b), without a loop over them."""
    info, _, largest, smallest, error = numbers
    condition = (largest / smallest).clamp(min=1.0)
    good = (info == 0) & (smallest > floor) & (error <= BACKWARD_TOLERANCE)
    return bool((good & (error * condition <= FORWARD_TOLERANCE)).all())


@dataclass
class Standing:
    """Where one system stands on the ladder.

    Attributes:
        name: of the system in messages. ridge: asked for; used: relative to `unit`.
        dead: its columns without variance.
    """

    name: str
    ridge: float
    unit: float
    dead: int
    working: torch.dtype
    used: float
    steps: list[str] = field(default_factory=list)

    def diagnostics(self, numbers: Numbers) -> Diagnostics:
        return Diagnostics(
            self.ridge,
            self.used,
            self.used * self.unit,
            numbers.condition,
            numbers.error,
            self.dead,
            str(self.working).removeprefix("torch."),
            tuple(self.steps),
            numbers.pivot,
        )

    def climb(self, numbers: Numbers, reason: str, floor: float) -> None:
        """The next rung.

        Raises:
            NumericalError: it was the last one.
        """
        # the smallest ridge that can help: it lifts the eigenvalues of the scaled matrix
        magnified = (
            numbers.info == 0 and numbers.smallest > floor and numbers.error <= BACKWARD_TOLERANCE
        )
        enough = numbers.error * numbers.largest / FORWARD_TOLERANCE if magnified else 0.0
        raised = max(self.used * 10, floor, enough)
        single = self.working == torch.float32
        if not single and (raised > LARGEST_RIDGE or len(self.steps) == LADDER_STEPS):
            tried = " | ".join([*self.steps, f"ridge {self.used:.1e}: {reason}"])
            raise NumericalError(f"no usable factorisation of {self.name}: {tried}")
        if single:
            self.steps.append(f"float32: {reason}; repeated in float64")
            self.working = torch.float64
        else:
            self.steps.append(f"ridge {self.used:.1e}: {reason}; raised to {raised:.1e}")
            self.used = raised


class Climbed(NamedTuple):
    """(k, s, r) and (k, r), and a record for each of the k systems."""

    solution: Tensor
    shift: Tensor
    diagnostics: tuple[Diagnostics, ...]


def climb_all(
    matrix: Tensor,
    right: Tensor,
    mean_kept: Tensor | None,
    mean_dropped: Tensor | None,
    standings: list[Standing],
    floor: float,
) -> Climbed:
    """Attempts in float64 at all of these, each a rung up already, until each is good enough.

    Raises:
        NumericalError: one of them has come to the end of the ladder; it says which.
    """
    solution: Tensor | None = None
    shift: Tensor | None = None
    tried: Attempt | None = None
    done: list[Diagnostics | None] = [None] * len(standings)
    while same := [i for i, found in enumerate(done) if found is None]:
        every = len(same) == len(standings)
        if every:
            # a solution that is to be repeated is as large as the right sides
            solution = shift = tried = None
        tried = attempt(
            matrix if every else matrix[same],
            right if every else right[same],
            matrix.new_tensor([standings[i].used * standings[i].unit for i in same]),
            mean_kept if every or mean_kept is None else mean_kept[same],
            mean_dropped if every or mean_dropped is None else mean_dropped[same],
        )
        if solution is None or shift is None:
            # the last attempt at all systems: its tensors are the result unless some fail
            solution, shift = tried.solution, tried.shift
        for at, (i, numbers) in enumerate(zip(same, numbers_of(tried), strict=True)):
            reason = numbers.reason(floor)
            if reason is not None:
                standings[i].climb(numbers, reason, floor)
                continue
            if tried.solution is not solution:
                solution[i], shift[i] = tried.solution[at], tried.shift[at]
            done[i] = standings[i].diagnostics(numbers)
    if solution is None or shift is None:
        raise ValueError("called with no system")
    return Climbed(solution, shift, tuple(found for found in done if found is not None))


def table_of(tried: Attempt, *more: Tensor) -> Tensor:
    """`Numbers` of b systems as rows, then `more` of them (b,): float64 on the CPU, waited once."""
    rows = (tried.info, tried.pivot, tried.largest, tried.smallest, tried.error, *more)
    return torch.stack([row.double() for row in rows]).cpu()


def numbers_of(tried: Attempt) -> list[Numbers]:
    return [Numbers(*column) for column in table_of(tried).T.tolist()]

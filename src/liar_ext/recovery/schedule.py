"""How long to train, how fast, and on which windows in which step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from liar_ext.errors import InputError
from liar_ext.seeds import SEEDS


@dataclass(frozen=True)
class Schedule:
    """Attributes:

    steps: updates; batch_size: windows in a forward; accumulation: forwards in an update.
    learning_rate: at its height, after `warmup` steps (None: 3 % of them); floor: at the end, as a
        fraction of it. In between it follows a cosine.
    weight_decay, betas: of AdamW; clip: the norm of all gradients at most, None for any.
    seed: of the order of the windows.
    evaluate_every: steps between two looks at the held-out windows, None for a tenth of all.
    save_every: steps between two states to go on from.
    Raises:
        InputError: a number that means nothing; names the option.
    """

    steps: int
    learning_rate: float = 2e-4
    batch_size: int = 8
    accumulation: int = 1
    warmup: int | None = None
    floor: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    seed: int = 0
    evaluate_every: int | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        rate, clip = self.learning_rate, self.clip
        bounds: list[tuple[str, Any, bool, str]] = [
            *(
                (name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
                for name in WHOLE
            ),
            ("lr", rate, 0 < rate <= 1, "above 0, at most 1"),
            ("warmup", self.warmup, (self.warmup or 0) >= 0, "0 or more"),
            ("floor", self.floor, 0 <= self.floor <= 1, "a fraction, 0 to 1"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < 1, "0 or more, below 1"),
            ("betas", self.betas, all(0 <= b < 1 for b in self.betas), "0 or more, below 1"),
            ("clip", clip, clip is None or 0 < clip < math.inf, "a positive number"),
            (
                *("evaluate_every", self.evaluate_every),
                *(self.evaluate_every is None or self.evaluate_every >= 1, "at least 1"),
            ),
            ("seed", self.seed, 0 <= self.seed < SEEDS, f"0 to {SEEDS - 1}"),
        ]
        for name, value, good, wanted in bounds:
            if not good:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be {wanted}")

    @property
    def windows(self) -> int:
        """Windows of an update."""
        return self.batch_size * self.accumulation

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` others: `lr (s+1)/w` for s < w, then
        `lr (f + (1 − f) (1 + cos(π (s − w) / (steps − w))) / 2)`."""
        warmup = math.ceil(0.03 * self.steps) if self.warmup is None else self.warmup
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        wave = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.learning_rate * (self.floor + (1 - self.floor) * wave)

    def looks_at(self, step: int) -> bool:
        """Whether the held-out windows are looked at after `step` updates."""
        every = self.evaluate_every or max(self.steps // 10, 1)
        return step == self.steps or step % every == 0

    def order(self, available: int) -> Callable[[int], list[list[int]]]:
        """Which windows each step has, from the seed and its number alone.

        Each window is seen once before any is seen again, in an order that is new every time.

        Args:
            available: windows that there are.
        Returns:
            step -> the indices of each of its forwards.
        """
        known: dict[int, list[int]] = {}

        def epoch(number: int) -> list[int]:
            if number not in known:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                for old in [n for n in known if n < number - 1]:
                    del known[old]
                known[number] = torch.randperm(available, generator=generator).tolist()
            return known[number]

        def of(step: int) -> list[list[int]]:
            begin = step * self.windows
            chosen = [
                epoch(n // available)[n % available] for n in range(begin, begin + self.windows)
            ]
            size = self.batch_size
            return [chosen[at : at + size] for at in range(0, len(chosen), size)]

        return of

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "betas": list(self.betas)}


WHOLE = ("steps", "batch_size", "accumulation", "save_every")

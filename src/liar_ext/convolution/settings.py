"""What `liar fuse` is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from liar_ext.errors import InputError, unknown_choice
from liar_ext.seeds import SEEDS

REPAIRS = ("liar", "none")
IMPORTANCES = ("loss", "accuracy", "paper")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class FuseSettings:
    """One choice of convolutions.

    Attributes:
        images: a folder with a folder for each class, or an .npz or .safetensors with `images` and
            `labels`.
        time: of the dense network, batch norms folded in, as a fraction of its seconds.
        top: plans that are built and compared as whole models.
        repair: `liar`, merged convolutions refitted by least squares; `none`.
        importance: what a segment is worth (`tables.worth`).
        largest_kernel: of merged convolutions.
        held_out: fraction of the images that plans are measured on and nothing is fitted to.
        patches: positions at most that a convolution is refitted to.
        table_steps: updates of a merged convolution before it is measured for the table.
        finetune_steps: updates of the whole network at the end; learning_rate: of both.
        batch_size: images at a time; also what latency is measured with.
        repeats: rounds of each latency.
        steps: units of the budget.
    Raises:
        InputError: a value that means nothing; names the option.
    """

    images: str
    time: float
    top: int = 5
    repair: str = "liar"
    importance: str = "loss"
    largest_kernel: int = 7
    held_out: float = 0.25
    patches: int = 65_536
    table_steps: int = 0
    finetune_steps: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 64
    repeats: int = 15
    steps: int = 2000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (
            *(("repair", REPAIRS), ("importance", IMPORTANCES), ("device", DEVICES)),
        ):
            if getattr(self, name) not in known:
                raise unknown_choice(f"--{name}", getattr(self, name), known)
        least = {
            **dict.fromkeys(("top", "largest_kernel", "patches", "batch_size", "repeats"), 1),
            **dict.fromkeys(("table_steps", "finetune_steps", "seed"), 0),
            "steps": 100,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                value = getattr(self, name)
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")
        if self.seed >= SEEDS:
            raise InputError(f"--seed {self.seed}: must be 0 to {SEEDS - 1}")
        for name, high in (("time", 1.0), ("held_out", 0.9), ("learning_rate", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= high):
                option = "lr" if name == "learning_rate" else name.replace("_", "-")
                raise InputError(f"--{option} {value}: must be above 0, and {high:g} at most")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table_identity(self) -> dict[str, Any]:
        """All that the tables depend on beside the network and the images."""
        own = ("repair", "largest_kernel", "held_out", "patches", "table_steps", "batch_size")
        values = {name: getattr(self, name) for name in (*own, "seed")}
        if self.table_steps:
            values["learning_rate"] = self.learning_rate
        return values

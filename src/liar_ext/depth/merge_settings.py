"""What a merge of layers is asked to do: LaCo's hyper-parameters, and where and on what it runs."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from liar_ext.depth.rules import NORMS, RULES
from liar_ext.depth.similarity import KINDS
from liar_ext.errors import InputError, unknown_choice
from liar_ext.recipe import CHOICES as RECIPE_CHOICES

# LaCo's for a LLaMA-7B of 32 layers
COMBINE, INTERVAL, DEPTH = 4, 2, 32
THRESHOLD = 0.65
CHOICES = {
    "rule": tuple(RULES),
    "norms": NORMS,
    "similarity": KINDS,
    "device": RECIPE_CHOICES["device"],
    "dtype": RECIPE_CHOICES["dtype"],
}
LEAST = {
    "combine": 2,
    "lowest": 0,
    "highest": 1,
    "interval": 1,
    "drop": 1,
    "texts": 1,
    "seq_len": 2,
    "batch_size": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class Schedule:
    """Where and how far a search goes in a model of `count` layers; see `MergeSettings`.

    A threshold that is None is to be found.
    """

    count: int
    combine: int
    lowest: int
    highest: int
    interval: int
    threshold: float | None
    drop: int | None

    @property
    def bases(self) -> range:
        """Layers that may become the base of a merge, from the top down."""
        return range(self.highest - self.combine, self.lowest - 1, -1)


@dataclass(frozen=True)
class MergeSettings:
    """One merge of layers; letters are those of LaCo's Algorithm 1.

    Attributes:
        rule, norms: what becomes of the weights, see `rules`.
        combine: C, layers that one merge makes one of, the base among them; fewer where the
            model ends before, and in the last merge of `drop`.
        lowest, highest: [L, H), where bases are looked for: the first is H − C. As published,
            layers above H − 1 are taken in as well when merges before have brought them down.
        interval: I, how far below an accepted merge the next base is looked for.
        threshold: T, in (−1, 1]; a merge is accepted if the similarity is above it.
        drop: layers that are to go, exactly; without a threshold the highest that lets them go is
            found.
        similarity: `flat` or `token`, see `similarity`.
        calibration: file or dataset; texts: D, how many of it; seq_len: tokens of each at most.
        batch_size: texts that go through a layer together; seed: of their choice.
        device, dtype: where and in what to compute; the files keep their dtypes.

    Fields that are None depend on the model, see `schedule`.
    """

    rule: str = "telescope"
    norms: str = "auto"
    combine: int | None = None
    lowest: int | None = None
    highest: int | None = None
    interval: int | None = None
    threshold: float | None = None
    drop: int | None = None
    similarity: str = "flat"
    calibration: str | None = None
    texts: int = 10
    seq_len: int = 128
    batch_size: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(f"--{name}", getattr(self, name), choices)
        for name, least in LEAST.items():
            value: Any = getattr(self, name)
            if value is None and name not in ("texts", "seq_len", "batch_size", "seed"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"--{_flag(name)} {value}: must be a whole number of at least {least}"
                )
        above: Any = self.threshold
        number = isinstance(above, int | float) and not isinstance(above, bool)
        if above is not None and not (number and -1 < above <= 1):
            raise InputError(
                f"--threshold {above}: is a cosine; must be above -1 and at most 1, e.g. 0.65"
            )
        text: Any = self.calibration
        if isinstance(text, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(text))

    def schedule(self, count: int) -> Schedule:
        """The search in a model of `count` layers, with nothing left open.

        C is 4 and I is 2 for 32 layers and in proportion below, at least 2 and 1; L is 0; H leaves
        the last layer out where there are layers enough. T is 0.65, with `drop` None: to be found.

        Raises:
            InputError: the model has too few layers, or the range has.
        """
        if count < 2:
            raise InputError(f"the model has {count} layer; there is nothing to merge")
        combine, lowest, highest = self.combine, self.lowest or 0, self.highest
        interval, threshold = self.interval, self.threshold
        if combine is None:
            combine = max(2, min(COMBINE, COMBINE * count // DEPTH))
        if highest is None:
            highest = count - 1 if count - 1 - lowest >= combine else count
        if interval is None:
            interval = max(1, min(INTERVAL, INTERVAL * count // DEPTH))
        if threshold is None and self.drop is None:
            threshold = THRESHOLD
        if combine > count:
            raise InputError(f"--combine {combine}: the model has {count} layers")
        if highest > count:
            raise InputError(
                f"--highest {highest}: the model has {count} layers, so that {count} is all of them"
            )
        if lowest >= highest:
            raise InputError(
                f"--lowest {lowest} with --highest {highest}: must be below it, they say where "
                "layers are merged"
            )
        if highest - lowest < combine:
            raise InputError(
                f"--combine {combine}: there are {highest - lowest} layers from --lowest {lowest} "
                f"to --highest {highest}; lower it, or widen the range"
            )
        if self.drop is not None and self.drop >= count:
            raise InputError(f"--drop {self.drop}: of {count} layers at least one stays")
        return Schedule(count, combine, lowest, highest, interval, threshold, self.drop)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


def _flag(name: str) -> str:
    return name.replace("_", "-")

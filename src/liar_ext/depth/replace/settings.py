"""What a replacement of layers is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liar_ext.depth.methods import METHODS
from liar_ext.depth.replace.network import NETWORKS
from liar_ext.errors import InputError, unknown_choice
from liar_ext.recipe import CHOICES as RECIPE_CHOICES
from liar_ext.recovery.text import TextTraining

# a window goes in one piece: methods that choose layers each by itself have none
DEPTHS = tuple(name for name, method in METHODS.items() if method.window)
CHOICES = {
    "depth": DEPTHS,
    "network": tuple(NETWORKS),
    "loss": ("mse", "lm"),
    "loss_tokens": ("plain", "normalised"),
    "init": ("inherit", "random"),
    "keep": ("best", "last"),
    "device": RECIPE_CHOICES["device"],
}
# of LLM-Streamline's repository, per loss; a Schedule has the rest
_BOTH = {"accumulation": 16, "weight_decay": 1e-3, "floor": 0.25}
SCHEDULES: dict[str, dict[str, Any]] = {
    "mse": {**_BOTH, "betas": (0.9, 0.999), "clip": 5.0},
    "lm": {**_BOTH, "betas": (0.9, 0.95), "clip": 1.0},
}


@dataclass(frozen=True)
class Replacement:
    """One window of layers, and what stands in for it.

    Attributes:
        training: of what stands in.
        drop: layers that the result has fewer; the window has `count` more than that. depth: how
            it is chosen, a name in `DEPTHS`.
        window: instead of both, its first and its last layer.
        network: a name in `NETWORKS`: `layer` or `layers`, decoder layers of the model; `swiglu` or
            `mlp`, one without attention. count: how many; None is the network's usual number.
        init: `inherit`, as the first layers of the window; `random`, by the training's seed.
        loss: `mse`, to the hidden states of the whole model behind the window; `lm`, the next
            token through the shortened model.
        loss_tokens: of `mse`: `plain`, or `normalised`, each token's error over its target's mean
            square.
        keep: the weights with the best loss on held-out windows, or the last.
        samples: windows of the training that the choice looks at.
        device: auto, cpu or cuda.
    Raises:
        InputError: a value that means nothing, alone or with another; names the option.
    """

    training: TextTraining
    drop: int | None = None
    depth: str = "streamline"
    window: tuple[int, int] | None = None
    network: str = "layer"
    count: int | None = None
    init: str = "inherit"
    loss: str = "mse"
    loss_tokens: str = "plain"
    keep: str = "best"
    samples: int = 50
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                flag = name.replace("_", "-")
                raise unknown_choice(f"--{flag}", value, choices)
        if (self.drop is None) == (self.window is None):
            given = "neither is given" if self.drop is None else "both are given"
            raise InputError(f"--drop N or --window A-B says which layers go, and {given}")
        for name in ("drop", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        if self.count not in (None, 1) and not NETWORKS[self.network].several:
            raise InputError(
                f"--count {self.count}: is of --network layers; {self.network} is one layer"
            )
        if self.stand_ins < 1:
            raise InputError(f"--count {self.count}: must be at least 1")
        if self.window is not None and not 0 <= self.window[0] <= self.window[1]:
            first, last = self.window
            raise InputError(f"--window {first}-{last}: must be FIRST-LAST, counted from 0")
        if self.loss == "lm" and self.loss_tokens != "plain":
            raise InputError(
                f"--loss-tokens {self.loss_tokens}: is of --loss mse; the next token has no target "
                "to be measured by"
            )

    @property
    def stand_ins(self) -> int:
        """Layers that stand in for the window."""
        return NETWORKS[self.network].count if self.count is None else self.count

    def to_json(self) -> dict[str, Any]:
        """All that the result depends on beside the source and the training; for a report."""
        if self.window is not None:
            where: dict[str, Any] = {"window": list(self.window)}
        else:
            where = {"drop": self.drop, "depth": self.depth, "samples": self.samples}
        of_loss = {"loss_tokens": self.loss_tokens} if self.loss == "mse" else {}
        return {
            **where,
            "network": self.network,
            "count": self.stand_ins,
            "init": self.init,
            "loss": self.loss,
            **of_loss,
            "keep": self.keep,
        }

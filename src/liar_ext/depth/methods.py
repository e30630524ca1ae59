"""Ways to choose the layers that are left out, by name.

A method is a measure of layers, or of spans of them, and whether it takes a span in one piece. To
add one: a measure in `depth/measures`, if there is none that it goes by, and a line here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from liar_ext.errors import InputError, unknown_choice

if TYPE_CHECKING:
    from liar_ext.recipe import Recipe

# what a method goes by: nothing but places; the weights; hidden states; the loss without a layer;
# gradients of the loss
Needs = Literal["nothing", "weights", "states", "losses", "gradients"]


@dataclass(frozen=True)
class Measure:
    """What is measured of every layer, or of every span of layers: low = can go.

    Attributes:
        needs: what it is made from; span: it is defined for several layers in a row, too.
        meaning: in words, with its source.
    """

    needs: Needs
    span: bool
    meaning: str


MEASURES = {
    "influence": Measure(
        "states",
        True,
        "1 − mean cosine of what enters and leaves (block influence, arXiv 2403.03853 eq. 1; over "
        "a span, LLM-Streamline 2403.19135)",
    ),
    "angle": Measure(
        "states",
        True,
        "mean angle between what enters and leaves, over π (arXiv 2403.17887 eq. 8)",
    ),
    "magnitude-l1": Measure("weights", False, "sum of |w| over a layer's parameters (2411.15558)"),
    "magnitude-l2": Measure("weights", False, "sum of w² over a layer's parameters (2411.15558)"),
    "taylor": Measure(
        "gradients",
        False,
        "sum of |w ∂L/∂w| over a layer's parameters, L the loss of the next token (2411.15558)",
    ),
    "loss": Measure(
        "losses", False, "loss of the next token without the layer (2402.02834, 2411.15558)"
    ),
}


@dataclass(frozen=True)
class DepthMethod:
    """How layers are chosen.

    Attributes:
        measure: a name in `MEASURES`, or None where places alone decide.
        window: layers go in one piece, the span that measures least; else the lowest ones, each by
            itself.
        repeated: one layer at a time, everything measured again without it.
        summary: for `--help`.
    """

    measure: str | None
    window: bool
    summary: str
    repeated: bool = False

    @property
    def needs(self) -> Needs:
        return "nothing" if self.measure is None else MEASURES[self.measure].needs


METHODS = {
    "reverse": DepthMethod(None, True, "the last ones (Reassessing Layer Pruning)"),
    "shortgpt": DepthMethod("influence", False, "the lowest block influence, each by itself"),
    "streamline": DepthMethod("influence", True, "the window with the highest cosine"),
    "angular": DepthMethod("angle", True, "the window with the smallest angle"),
    "perplexity": DepthMethod("loss", False, "those whose absence costs least, each by itself"),
    "perplexity-greedy": DepthMethod(
        "loss", False, "the same, one after the other (SLEB)", repeated=True
    ),
    "taylor": DepthMethod("taylor", False, "the lowest |w ∂L/∂w|"),
    "magnitude-l1": DepthMethod("magnitude-l1", False, "the lowest sum of |w|"),
    "magnitude-l2": DepthMethod("magnitude-l2", False, "the lowest sum of w²"),
    "random": DepthMethod(None, False, "a random choice, as a baseline"),
}


def check_depth(recipe: Recipe) -> None:
    """Refuse depth fields of a recipe that say nothing, too much or what is not possible.

    Raises:
        InputError: which, and what to give instead.
    """
    listed = recipe.drop_layers
    if listed is not None:
        object.__setattr__(recipe, "drop_layers", tuple(listed))
        if recipe.depth is not None or recipe.drop is not None:
            raise InputError(
                "--drop-layers with --depth or --drop: both say which layers go; give one of them"
            )
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed)
        if not listed or not whole or len(set(listed)) != len(tuple(listed)):
            raise InputError(
                f"--drop-layers {','.join(map(str, listed)) or '(empty)'}: must be layers from 0, "
                "each once, e.g. 20-27 or 3,7"
            )
    if recipe.depth is not None and recipe.depth not in METHODS:
        raise unknown_choice("--depth", recipe.depth, METHODS)
    if (recipe.depth is None) != (recipe.drop is None):
        given, missing = ("--depth", "--drop N") if recipe.depth else ("--drop", "--depth METHOD")
        raise InputError(f"{given} needs {missing} beside it: how layers are chosen, and how many")
    if recipe.drop is not None and (
        not isinstance(recipe.drop, int) or isinstance(recipe.drop, bool) or recipe.drop < 1
    ):
        raise InputError(f"--drop {recipe.drop}: must be a whole number of at least 1")
    if recipe.span_repair != "none" and recipe.shortens and recipe.statistics == "oneshot":
        raise InputError(
            "--statistics oneshot with layers that are left out: their repair is fitted on the "
            "path that is being pruned; use --statistics sequential, or --span-repair none"
        )


def parse_layers(text: str, option: str = "--drop-layers") -> tuple[int, ...]:
    """`3`, `3,7`, `20-27` and combinations of these: indices of layers, from 0.

    Raises:
        InputError: it is something else, or names a layer twice.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise InputError(f"{option} {text}: must be layers from 0, e.g. 20-27 or 3,7")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) != len(found):
        raise InputError(f"{option} {text}: names a layer twice")
    return tuple(sorted(found))


def pick(values: Sequence[float], drop: int, window: bool) -> tuple[int, ...]:
    """The layers that go.

    Args:
        values: of each layer, or with `window` of each span of `drop` layers by its first; low goes
            first, and of equal ones the later.
    """
    order = sorted(range(len(values)), key=lambda at: (values[at], -at))
    if window:
        return tuple(range(order[0], order[0] + drop))
    return tuple(sorted(order[:drop]))


def placed(method: str, layers: int, drop: int, seed: int) -> tuple[int, ...]:
    """The layers that go where places alone decide."""
    if method == "reverse":
        return tuple(range(layers - drop, layers))
    return tuple(sorted(random.Random(seed).sample(range(layers), drop)))


def check_count(drop: int, layers: int, first: int = 0) -> None:
    """Raises InputError unless `drop` of the layers from `first` on can go and some stay."""
    if drop >= layers or drop > layers - first:
        most = min(layers - 1, layers - first)
        raise InputError(f"--drop {drop}: the model has {layers} layers, of which {most} can go")


def check_finite(name: str, values: Sequence[float]) -> None:
    """Raises InputError for a measure that is NaN or infinite."""
    bad = [at for at, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise InputError(
            f"layer {bad[0]}: its {name} is {values[bad[0]]}; check the checkpoint, or compute in "
            "a wider type with --dtype"
        )

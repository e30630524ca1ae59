"""Which layers are left out: what was measured of them, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from liar_ext.calibration.batch import Batch, first_samples
from liar_ext.depth.losses import losses_without
from liar_ext.depth.methods import METHODS, check_count, check_finite, pick, placed
from liar_ext.depth.states import turns
from liar_ext.depth.taylor import taylor
from liar_ext.depth.weights import magnitudes
from liar_ext.engine.runtime import Runtime
from liar_ext.errors import InputError
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class LayerChoice:
    """The layers of the source that a recipe leaves out.

    Attributes:
        layers: of the source; dropped: those that go, in order.
        measured: what it was made by: by the name of the measure, of each layer (of each span of
            as many layers as go, by its first, where they go in one piece).
        steps: of a method that takes one layer at a time, in the order in which they went: `layer`,
            and `loss`, of the model without it and those before it.
    """

    layers: int
    dropped: tuple[int, ...]
    measured: dict[str, list[float]] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers of the source that stay, in order."""
        return tuple(i for i in range(self.layers) if i not in self.dropped)

    @property
    def gaps(self) -> dict[int, range]:
        """The layers that are missing behind one of the result, by its index there; none for those
        in front of the first."""
        found = {}
        for at, layer in enumerate(self.kept):
            following = self.kept[at + 1] if at + 1 < len(self.kept) else self.layers
            if following > layer + 1:
                found[at] = range(layer + 1, following)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.layers,
            "after": len(self.kept),
            "dropped": list(self.dropped),
            "measured": self.measured,
            "steps": list(self.steps),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerChoice:
        dropped, steps = tuple(data["dropped"]), tuple(data["steps"])
        return cls(data["before"], dropped, data["measured"], steps)


def choose(recipe: Recipe, runtime: Runtime, batches: Sequence[Batch]) -> LayerChoice:
    """The layers that go.

    Where what they did is to be repaired the first layer stays: nothing is in front of it that
    could stand in for it.

    Args:
        runtime: of the whole model; batches: calibration tokens, none where the method needs none.
    Raises:
        InputError: layers that are not there, too many of them, or the method needs what the model
            has not.
    """
    layers = len(runtime.layers)
    hands_on = runtime.adapter.hands_on
    known = without_looking(recipe, layers, hands_on)
    if known is not None:
        return known
    name, drop, first = recipe.depth, recipe.drop, _first(recipe, hands_on)
    assert name is not None, "see `Recipe.shortens`"
    assert drop is not None, "see `check_depth`"
    method = METHODS[name]
    if method.repeated:
        return _greedy(runtime, _windows(recipe, batches), layers, drop, first)
    span = drop if method.window else 1
    assert method.measure is not None, "see `without_looking`"
    values = measure(method.measure, runtime, recipe, batches, span)
    check_finite(method.measure, values)
    dropped = pick(values[first:], drop, method.window)
    return LayerChoice(layers, tuple(first + layer for layer in dropped), {method.measure: values})


def without_looking(recipe: Recipe, layers: int, hands_on: bool = False) -> LayerChoice | None:
    """The layers that go where nothing has to be measured for it: they are listed, or go by their
    places. None where a method looks at the model.

    Args:
        layers: of the model; hands_on: the others need the first one (`Adapter`).
    Raises:
        InputError: layers that are not there, or too many of them.
    """
    first = _first(recipe, hands_on)
    if recipe.drop_layers is not None:
        if hands_on and 0 in recipe.drop_layers:
            raise InputError(
                "--drop-layers 0: the first layer makes what all others are given (position "
                "biases); keep it"
            )
        return _listed(recipe.drop_layers, layers, first)
    assert recipe.depth is not None, "see `Recipe.shortens`"
    assert recipe.drop is not None, "see `check_depth`"
    check_count(recipe.drop, layers, first)
    if METHODS[recipe.depth].measure is not None:
        return None
    dropped = placed(recipe.depth, layers - first, recipe.drop, recipe.seed)
    return LayerChoice(layers, tuple(first + layer for layer in dropped))


def _first(recipe: Recipe, hands_on: bool) -> int:
    """The first layer that can go."""
    return 1 if recipe.spans or hands_on else 0


def measure(
    name: str, runtime: Runtime, recipe: Recipe, batches: Sequence[Batch], span: int = 1
) -> list[float]:
    """A measure of `MEASURES` of each layer, or of each span of `span` layers by its first."""
    if name in ("influence", "angle"):
        return [getattr(turn, name) for turn in turns(runtime, batches, [span])[span]]
    assert span == 1, f"{name} is of single layers"
    if name == "loss":
        layers = range(len(runtime.layers))
        return losses_without(runtime, _windows(recipe, batches), [(layer,) for layer in layers])
    if name == "taylor":
        return taylor(runtime, batches, recipe)
    return magnitudes(runtime, int(name[-1]))


def choice_states(recipe: Recipe, layers: int, *, own: int, gradients: int, losses: int) -> int:
    """Hidden states, one for a token, that wait on the shelf at most while layers are chosen.

    Args:
        layers: of the model; own: tokens of all calibration batches, with padding; gradients,
            losses: of the windows that gradients are taken of, and that models are compared on.
    """
    if recipe.depth is None or recipe.drop is None:
        return 0
    method = METHODS[recipe.depth]
    if method.needs == "states":
        # what entered the layers of a span, and what leaves it
        return (1 + (recipe.drop if method.window else 1)) * own
    # what enters every layer, and the gradient; or a choice for each layer, and what one makes
    return (layers + 1) * {"gradients": gradients, "losses": losses}.get(method.needs, 0)


def _windows(recipe: Recipe, batches: Sequence[Batch]) -> Sequence[Batch]:
    """What models without layers are compared on."""
    return first_samples(batches, recipe.search_samples)


def _greedy(
    runtime: Runtime, windows: Sequence[Batch], layers: int, drop: int, first: int
) -> LayerChoice:
    """One layer at a time, the losses of all others measured again without it."""
    gone: list[int] = []
    steps: list[dict[str, Any]] = []
    for _ in range(drop):
        left = [layer for layer in range(first, layers) if layer not in gone]
        losses = losses_without(runtime, windows, [(*gone, layer) for layer in left])
        check_finite("loss", losses)
        (at,) = pick(losses, 1, window=False)
        gone.append(left[at])
        steps.append({"layer": left[at], "loss": losses[at]})
    return LayerChoice(layers, tuple(sorted(gone)), steps=tuple(steps))


def _listed(listed: Sequence[int], layers: int, first: int) -> LayerChoice:
    if beyond := [layer for layer in listed if layer >= layers]:
        raise InputError(
            f"--drop-layers {beyond[0]}: the model has {layers} layers, 0 to {layers - 1}"
        )
    if len(listed) == layers:
        raise InputError(f"--drop-layers: all {layers} layers; keep at least one")
    if first and 0 in listed:
        raise InputError(
            "--drop-layers 0: nothing is in front of the first layer that could stand in for it; "
            "keep it, or give --span-repair none"
        )
    return LayerChoice(layers, tuple(sorted(listed)))

"""What a repair aims at: what carries hidden states for it, and what takes its statistics."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from liar_ext.engine.measure import Measurer
from liar_ext.engine.pairs import PairMeasurer, PairStream
from liar_ext.engine.residual_stream import ResidualStream
from liar_ext.engine.spans import LocalSpans
from liar_ext.engine.stream import Stream
from liar_ext.errors import InputError
from liar_ext.models import Adapter, text_config
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class Paths:
    """Attributes:
    stream: what carries hidden states; measurer: what takes statistics.
    residual: layers have to be a sum, their input and the outputs of their Sites.
    """

    stream: type[Stream]
    measurer: type[Measurer]
    residual: bool = False


# by `Recipe.target_signal`
PATHS = {
    "local": Paths(Stream, Measurer),
    "dense": Paths(PairStream, PairMeasurer),
    "stream": Paths(ResidualStream, PairMeasurer, residual=True),
}


# the same where layers are left out, and what they did is repaired
SPAN_PATHS = {
    "local": Paths(LocalSpans, PairMeasurer, residual=True),
    "dense": Paths(PairStream, PairMeasurer, residual=True),
    "stream": PATHS["stream"],
}


def paths_for(recipe: Recipe, adapter: Adapter, config: PretrainedConfig) -> Paths:
    """The entry of `PATHS` or `SPAN_PATHS`.

    Raises:
        InputError: this model's layers have no such target.
    """
    if recipe.shortens:
        adapter.check_one_stack()
    signal = recipe.target_signal
    found = (SPAN_PATHS if recipe.spans else PATHS)[signal]
    if found.residual and recipe.spans and not adapter.residual(text_config(config)):
        raise InputError(
            f"--span-repair {recipe.span_repair}: this {adapter.model_type} model "
            f"{adapter.no_sum}, so that no consumer in front can stand in for layers; "
            "give --span-repair none"
        )
    if found.residual and not adapter.residual(text_config(config)):
        fit = ", ".join(name for name, paths in PATHS.items() if not paths.residual)
        raise InputError(
            f"--target-signal {signal}: this {adapter.model_type} model {adapter.no_sum}, and "
            f"its residual stream is no sum of what its Sites say; choose from {fit}"
        )
    return found

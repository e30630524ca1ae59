"""What a repair aims at: what carries hidden states for it, and what takes its statistics."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from liar_ext.engine.measure import Measurer
from liar_ext.engine.pairs import PairMeasurer, PairStream
from liar_ext.engine.residual_stream import ResidualStream
from liar_ext.engine.stream import Stream
from liar_ext.errors import InputError
from liar_ext.models import Adapter, text_config


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


def paths_for(signal: str, adapter: Adapter, config: PretrainedConfig) -> Paths:
    """The entry of `PATHS`.

    Raises:
        InputError: this model's layers have no such target.
    """
    found = PATHS[signal]
    if found.residual and not adapter.residual(text_config(config)):
        fit = ", ".join(name for name, paths in PATHS.items() if not paths.residual)
        raise InputError(
            f"--target-signal {signal}: this {adapter.model_type} model normalises its residual "
            f"stream after each addition (post-norm), and what a Site adds to it is no sum; "
            f"choose from {fit}"
        )
    return found

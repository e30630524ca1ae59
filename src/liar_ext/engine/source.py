"""The dense checkpoint that is pruned, and what a trace adds to its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout
from liar_ext.models.traced import KEY as TRACE


def dense_checkpoint(
    folder: Path, traced: tuple[str, ...] | None = None
) -> tuple[CheckpointReader, PreTrainedModel, list[str]]:
    """The reader of a checkpoint that can be pruned, its model on `meta`, and the names of tensors
    that are no part of the model.

    Args:
        traced: kinds of Site to find by a trace where the family has no adapter; None is no trace.
    Raises:
        InputError: it is pruned already, of an unsupported model, incomplete, or has more layers
            than its config says.
    """
    reader = CheckpointReader(folder)
    if layout.KEY in reader.config:
        raise InputError(
            f"{folder}: pruned already, to shapes of its own; start from the dense one"
        )
    reader.config = with_trace(reader.config, traced)
    config = layout.config_object(reader.config)
    adapter = adapter_for(config)  # refuses by name, before the reader trips over tensor names
    model = layout.empty_model(config)
    left_over = reader.bind(model)
    lists = [f"{path}." for path, _ in adapter.chain(model).stacks]
    beyond = [name for name in left_over if any(layers in name for layers in lists)]
    if beyond:
        raise InputError(
            f"{folder}: {beyond[0]} and {len(beyond) - 1} more tensors of the layers are not in "
            f"{type(model).__name__}; check num_hidden_layers in config.json"
        )
    return reader, model, left_over


def with_trace(data: dict[str, Any], traced: tuple[str, ...] | None) -> dict[str, Any]:
    """The `config.json` of a dense model as it is pruned: with a trace of now, or without one.

    Args:
        traced: kinds of Site to find by a trace where the family has no adapter; None is no trace.
    Raises:
        UnsupportedModelError: it cannot be traced, or has no such Site.
    """
    plain = {name: value for name, value in data.items() if name != TRACE}
    if traced is None:
        return plain
    from liar_ext.tracing import traced_data

    return traced_data(plain, traced)

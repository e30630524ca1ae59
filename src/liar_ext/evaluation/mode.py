"""The state a model is evaluated in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from liar_ext.errors import InputError


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode and no gradients inside; afterwards every module trains as it did before.

    Yields:
        The device for the inputs: that of the embedding, which is right for an offloaded model too.
    """
    training = [module for module in model.modules() if module.training]
    embedding = embedding_of(model)
    weights = model.parameters() if embedding is None else embedding.parameters()
    first = next(iter(weights), None)
    model.eval()
    try:
        # not inference_mode: buffers made lazily in a forward could never be trained through
        with torch.no_grad():
            yield torch.device("cpu") if first is None else first.device
    finally:
        # one by one: model.train() would also switch on the modules that were off
        for module in training:
            module.training = True


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The input embedding of a transformers model; None for another module."""
    get = getattr(model, "get_input_embeddings", None)
    return get() if callable(get) else None


def check_ids(model: nn.Module, lowest: int, highest: int) -> None:
    """Raises InputError where token ids from `lowest` to `highest` are none of the model's."""
    vocabulary = getattr(embedding_of(model), "num_embeddings", None)
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        raise InputError(
            f"token ids run from {lowest} to {highest} and the model's vocabulary has "
            f"{vocabulary}; use the model's own tokenizer"
        )


def positions_of(model: nn.Module) -> int | None:
    """The longest input a model's config allows; None where it says nothing."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)

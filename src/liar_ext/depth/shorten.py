"""A checkpoint of the layers that stay, and the model of it, to be pruned like any other."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.depth.config import remapped
from liar_ext.depth.surgery import check_places, layer_list
from liar_ext.models import layout


def shortened_checkpoint(
    reader: CheckpointReader, model: PreTrainedModel, kept: Sequence[int]
) -> tuple[CheckpointReader, PreTrainedModel]:
    """A reader for which the other layers are not in the files, and its model on `meta`.

    Args:
        reader: of all layers; model: of the same; kept: for each layer of the result, its index
            there.
    Raises:
        InputError: a model whose layers depend on their place.
    """
    path, layers = layer_list(model)
    config = remapped(reader.config, kept)
    short = layout.empty(config)
    check_places(path, layers, kept, short, {})
    own = CheckpointReader(reader.folder)
    # names that only transformers' rules explain are found with all layers there
    own.bind(model)
    own.config = config
    own.keep_layers(path, kept)
    own.bind(short)
    return own, short

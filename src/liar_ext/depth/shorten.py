"""A checkpoint of the layers that stay, and the model of it, to be pruned like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
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


def specs_of(reader: CheckpointReader, model: PreTrainedModel) -> list[TensorSpec]:
    """The tensors of a model that are in files, in its order, in the dtype that they have there.

    Args:
        reader: bound to the model, or to one that has no tensor less.
    """
    return [
        TensorSpec(name, tuple(tensor.shape), reader.dtype(name))
        for name, tensor in model.state_dict().items()
        if name in reader
    ]


def copy_tensors(made: Path, reader: CheckpointReader, specs: Sequence[TensorSpec]) -> None:
    """These tensors from file to file, in pieces, into a new folder; some may have become empty."""
    writer = ShardWriter(made, specs)
    try:
        for spec in specs:
            writer.write_pieces(spec.name, reader.pieces(spec.name) if spec.bytes else ())
        writer.finish()
    finally:
        writer.close()

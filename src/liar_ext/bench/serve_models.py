"""The models that `liar bench serve` times: folders with weights, or shapes with random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from liar_ext.bench.measure import source_name
from liar_ext.bench.workload import materialise
from liar_ext.checkpoint.load import load, resolve
from liar_ext.checkpoint.reader import (
    CONFIG,
    INDEX,
    SINGLE,
    CheckpointReader,
    parameter_count,
    read_config,
    tied_names,
)
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.evaluation.mode import embedding_of, positions_of
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.models.adapter import stated_dtype
from liar_ext.planning import dense_config, pruned_config
from liar_ext.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """One model of the command line.

    Attributes:
        given: as it was written; name: for people, unique in a run.
        folder: has a `config.json`, and the weights unless they are `random`.
        sparsity: of the shape that `SRC@F` names; None is the shape that the folder has.
    """

    given: str
    name: str
    folder: str
    random: bool
    sparsity: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sources(given: Sequence[str], random: bool) -> list[Source]:
    """What each word of the command line names; the first is the dense model.

    A folder, a `config.json`, a hub id, or one of these with `@F` behind it: the shape that equal
    widths at sparsity F have, with random weights.

    Raises:
        InputError: no such folder, or no such sparsity.
    """
    found = [_source(word, random) for word in given]
    words: dict[str, set[str]] = {}
    for source in found:
        words.setdefault(source.name, set()).add(source.given)
    # folders `a/out` and `b/out` are named in full; the same one twice is numbered: what a run
    # finds between it and itself is the noise
    unique: list[Source] = []
    for source in found:
        name = source.given if len(words[source.name]) > 1 else source.name
        copies = sum(own.given == source.given for own in unique)
        name = f"{name} ({copies + 1})" if copies else name
        unique.append(Source(source.given, name, source.folder, source.random, source.sparsity))
    return unique


def _source(word: str, random: bool) -> Source:
    path = Path(word).expanduser()
    base, at, share = word.rpartition("@")
    if path.exists() or not at:
        folder = _folder(word, random)
        if not random and path.is_file():
            raise InputError(
                f"{word}: has no weights; give their folder, or --random for random ones"
            )
        return Source(word, _name(word), str(folder), random)
    try:
        sparsity = float(share)
    except ValueError:
        sparsity = -1.0
    if not 0 < sparsity < 1:
        raise InputError(
            f"{word}: what follows @ is a sparsity above 0 and below 1, as in {base or 'SRC'}@0.5"
        )
    return Source(word, f"{_name(base)}@{share}", str(_folder(base, True)), True, sparsity)


def _folder(word: str, random: bool) -> Path:
    path = Path(word).expanduser()
    if path.is_file():
        if path.name != CONFIG:
            raise InputError(f"{word}: is a file; give a folder, or its {CONFIG}")
        return path.parent
    return resolve(word, config_only=random)


def _name(word: str) -> str:
    path = Path(word).expanduser()
    return source_name(str(path.absolute().parent) if path.is_file() else word)


@dataclass(frozen=True)
class Outline:
    """What is known of a model from its config.

    Attributes:
        data: the `config.json` that it has, or would have.
        kind: `decoder`, which generates, or `encoder`, whose output is that of its one forward.
        widths: units of every Site by layer, as `layout.read`; None without an adapter.
        positions: the longest sequence; None where the config says nothing. vocabulary: its ids.
    """

    source: Source
    data: dict[str, Any]
    kind: str
    widths: list[dict[str, int]] | None
    positions: int | None
    vocabulary: int

    @property
    def name(self) -> str:
        return self.source.name


def outline(
    source: Source, *, target: tuple[str, ...] = ("ffn", "heads"), round_to: int = 1
) -> Outline:
    """Read the config of a model.

    Args:
        target, round_to: of the shape at `source.sparsity`.
    Raises:
        InputError: no such model or shape, or it neither generates nor encodes text.
    """
    folder = Path(source.folder)
    data = read_config(folder)
    if source.sparsity is not None:
        recipe = Recipe(sparsity=source.sparsity, target=target, round_to=round_to)
        try:
            data = pruned_config(dense_config(folder), recipe)
        except InputError as error:
            raise InputError(f"{source.given}: {error}") from error
    model = layout.empty(data)
    if getattr(text_config(model.config), "is_encoder_decoder", False):
        raise InputError(
            f"{source.given}: it is an encoder-decoder; liar bench serve times decoders and "
            "encoders"
        )
    embedding = embedding_of(model) if model.main_input_name == "input_ids" else None
    if not isinstance(embedding, nn.Embedding):
        raise InputError(
            f"{source.given}: a {type(model).__name__} takes {model.main_input_name}; liar bench "
            "serve times decoders and encoders of text"
        )
    try:
        adapter = adapter_for(model.config)
    except UnsupportedModelError:
        # it runs all the same; nobody knows which part of it could be pruned
        widths, positions = None, positions_of(model)
    else:
        widths = layout.read(model)
        positions = adapter.max_positions(text_config(model.config))
    kind = "decoder" if model.can_generate() else "encoder"
    return Outline(source, data, kind, widths, positions, embedding.num_embeddings)


@dataclass(frozen=True)
class Served:
    """A model that can be run.

    Attributes:
        file_bytes: of the weight files; None where there are none.
    """

    outline: Outline
    model: PreTrainedModel
    file_bytes: int | None

    @property
    def name(self) -> str:
        return self.outline.name

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    @property
    def own_bytes(self) -> int:
        """Of its parameters and buffers, what is shared once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        unique = {tensor.data_ptr(): tensor for tensor in tensors}
        return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def reader_of(known: Outline) -> CheckpointReader:
    """The weight files, opened.

    Raises:
        InputError: there are none, or broken ones.
    """
    folder = Path(known.source.folder)
    try:
        return CheckpointReader(folder)
    except InputError as error:
        if any((folder / name).exists() for name in (SINGLE, INDEX)):
            raise
        raise InputError(f"{error}; or time its shape with --random weights") from error


def own_dtype(known: Outline) -> torch.dtype:
    """What the weights are in, or of random ones what the config says."""
    if known.source.random:
        return stated_dtype(layout.config_object(layout.base_data(known.data)))
    reader = reader_of(known)
    reader.bind(layout.empty(known.data))
    return reader.main_dtype()


def serve(known: Outline, device: torch.device, dtype: torch.dtype) -> Served:
    """Load a model, or make it of random weights.

    Args:
        dtype: of the weights.
    Raises:
        InputError: as `reader_of`.
    """
    if known.source.random:
        model = layout.empty(known.data)
        torch.manual_seed(0)
        materialise(model, device, dtype)
        if tied_names(model):
            model.tie_weights(recompute_mapping=False)
        return Served(known, model.eval(), None)
    size = sum(own["size"] for own in reader_of(known).sizes().values())
    return Served(known, load(known.source.folder, dtype=dtype, device=device), size)

"""The grown checkpoint, from file to file: a matrix of all layers is in memory, never the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.dtypes import DTYPES
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.shards import ShardWriter
from liar_ext.depth.grow.basis import shared_basis
from liar_ext.depth.grow.mlp import MlpOptions
from liar_ext.depth.grow.parts import Matrix, matrices_of, vectors_of
from liar_ext.depth.grow.predictors import Predictor, mean
from liar_ext.engine.progress import Progress
from liar_ext.errors import InputError


@dataclass(frozen=True)
class Places:
    """Attributes:
    path: of the list of layers; layers: of the source, on `meta`.
    kept: for each layer of the result its source; new: by gap, the place of the new layer.
    """

    path: str
    layers: nn.ModuleList
    kept: Sequence[int]
    new: Mapping[int, int]

    def name(self, layer: int, part: str) -> str:
        """The name in the result of a part of a layer of the source."""
        # a new layer stands behind the one that it is named after
        return f"{self.path}.{self.kept.index(layer)}.{part}"

    def new_name(self, gap: int, part: str) -> str:
        return f"{self.path}.{self.new[gap]}.{part}"

    def source_name(self, layer: int, part: str) -> str:
        """The name that the user knows it by."""
        return f"{self.path}.{layer}.{part}"

    def gaps_with(self, part: str) -> list[int]:
        """Gaps between layers that have a part: layers of other kinds have others."""
        return [gap for gap in self.new if part in dict(self.layers[gap].named_parameters())]

    def matrices(self) -> list[Matrix]:
        """All that a new layer has, each once."""
        found = {m.name: m for gap in self.new for m in matrices_of(self.layers[gap])}
        return list(found.values())

    def vectors(self) -> list[str]:
        return list(dict.fromkeys(v for gap in self.new for v in vectors_of(self.layers[gap])))

    def parameters(self) -> list[str]:
        """The names of all parameters of all new layers."""
        return [
            self.new_name(gap, part)
            for gap in self.new
            for part, _ in self.layers[gap].named_parameters()
        ]


@dataclass(frozen=True)
class Growing:
    """How new layers are made.

    Attributes:
        predictor, options, seed: see `PREDICTORS`.
        silenced: paths in a layer of the modules that are set to zero.
        device: where bases and predictions are computed.
    """

    predictor: Predictor
    options: MlpOptions
    seed: int
    silenced: frozenset[str]
    device: torch.device


@torch.no_grad()
def write_layers(
    reader: CheckpointReader,
    writer: ShardWriter,
    places: Places,
    how: Growing,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write the new layers, and copy everything else in pieces.

    Args:
        reader: bound to the grown model, in which a new layer has the tensors of the one below.
    Returns:
        for each matrix and shape that was predicted: its name, layers, rank, what the predictor
        says of its fit, and by gap the norm of the prediction over the mean of its neighbours'.
    Raises:
        InputError: nothing to learn from, or weights that do not fit the dtype of the file.
    """
    matrices = places.matrices()
    facts: list[dict[str, Any]] = []
    progress.begin(len(matrices), "matrices")
    for number, matrix in enumerate(matrices):
        if how.predictor.fit is None:
            for gap in places.gaps_with(matrix.name):
                _combine(reader, writer, places, how, gap, matrix.name)
        else:
            facts += [
                _predict(reader, writer, places, how, matrix, group)
                for group in _groups(places, matrix.name)
            ]
        progress.layer(number)
    for vector in places.vectors():
        for gap in places.gaps_with(vector):
            _combine(reader, writer, places, how, gap, vector)
    # saved buffers of a new layer are those of the one below it
    done = set(places.parameters())
    for name in writer.names:
        if name not in done:
            writer.write_pieces(name, reader.pieces(name))
    return facts


def check_learnable(places: Places, predictor: Predictor) -> None:
    """Raises InputError where a layer is no set of matrices and vectors, or where a predictor has
    to learn and there is nothing to learn from."""
    matrices = places.matrices()
    if predictor.fit is None:
        return
    for matrix in matrices:
        for group in _groups(places, matrix.name):
            if not _centres(group):
                raise InputError(
                    f"--predictor {predictor.name}: learns from three layers in a row, and "
                    f"{matrix.name} has the shape of layer {group[0]} in {len(group)} of "
                    f"{len(places.layers)} layers, no three in a row; use average, copy or identity"
                )


def _combine(
    reader: CheckpointReader,
    writer: ShardWriter,
    places: Places,
    how: Growing,
    gap: int,
    part: str,
) -> None:
    """A part of a new layer without a prediction."""
    if part.rpartition(".")[0] in how.silenced:
        found = torch.zeros_like(reader.get(places.name(gap, part)))
    elif how.predictor.average:
        found = mean(*(_checked(reader, places, layer, part) for layer in (gap, gap + 1)))
    else:
        found = reader.get(places.name(gap, part))
    writer.write(places.new_name(gap, part), found)


def _predict(
    reader: CheckpointReader,
    writer: ShardWriter,
    places: Places,
    how: Growing,
    matrix: Matrix,
    group: Sequence[int],
) -> dict[str, Any]:
    """A matrix of all new layers between layers of one shape."""
    assert how.predictor.fit is not None

    def read(layer: int) -> Tensor:
        return matrix.oriented(_checked(reader, places, layer, matrix.name))

    stored = {reader.dtype(places.name(layer, matrix.name)) for layer in group}
    wide = torch.float64 if torch.float64 in stored else torch.float32
    basis, coefficients = shared_basis(read, group, device=how.device, dtype=wide)
    facts: dict[str, Any] = {"name": matrix.name, "layers": list(group), "rank": basis.rank}
    fitted = None
    if basis.rank:
        fitted = how.predictor.fit(
            coefficients, _centres(group), how.options, _seed(how.seed, matrix.name, group)
        )
        facts |= fitted.facts
    norms: dict[str, float] = {}
    for gap in places.gaps_with(matrix.name):
        if gap not in group:
            continue
        if fitted is None:
            # all of them are zero
            new = read(gap).double()
        else:
            place = group.index(gap)
            new = basis.matrix(fitted(coefficients[place], coefficients[place + 1]))
        beside, own = (_norm(read(gap)) + _norm(read(gap + 1))) / 2, _norm(new)
        norms[str(gap)] = own / beside if beside else 0.0
        if how.predictor.scaled and own:
            new = new * (beside / own)
        name = places.new_name(gap, matrix.name)
        value = matrix.oriented(new).to("cpu", reader.dtype(name)).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{name}: predicted weights up to {float(new.abs().max()):.1e} do not fit "
                f"{value.dtype}; convert the checkpoint to bfloat16 or float32 first"
            )
        writer.write(name, value)
    return {**facts, "norms": norms}


def _groups(places: Places, part: str) -> list[list[int]]:
    """Layers that have this part in one shape, for each shape that stands beside a gap."""
    shapes: dict[int, tuple[int, ...]] = {}
    for index, layer in enumerate(places.layers):
        known = dict(layer.named_parameters())
        if part in known:
            shapes[index] = tuple(known[part].shape)
    wanted = dict.fromkeys(shapes[gap] for gap in places.gaps_with(part))
    return [[index for index, own in shapes.items() if own == shape] for shape in wanted]


def _centres(group: Sequence[int]) -> list[int]:
    """Places in the group of layers whose two neighbours are in it as well."""
    inner = range(1, len(group) - 1)
    return [place for place in inner if group[place + 1] - group[place - 1] == 2]


def _seed(seed: int, name: str, group: Sequence[int]) -> int:
    """One for each matrix, whatever is grown beside it."""
    text = f"{seed}/{name}/{group[0]}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.double()))


def _checked(reader: CheckpointReader, places: Places, layer: int, part: str) -> Tensor:
    tensor = reader.get(places.name(layer, part))
    name = places.source_name(layer, part)
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{name} is {tensor.dtype}; only float weights can be predicted")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name}: has NaN or infinite weights; the checkpoint is damaged")
    return tensor

"""The tensors of a wider model, made one by one from a narrow checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import PIECE_BYTES, CheckpointReader
from liar_ext.checkpoint.shards import TensorSpec
from liar_ext.errors import InputError
from liar_ext.export.padding import absent_values, widenings
from liar_ext.models import adapter_for, layout


class Widened:
    """A checkpoint with zero units put into its layers; a tensor is in memory at a time.

    Args:
        reader: bound to `narrow`; narrow, wide: both on `meta`. The wide one has all Sites.
    Attributes:
        specs: the tensors in the wide model's order, in the dtype of the files; what the narrow
            model lacks has that of the same tensor in another layer.
    """

    def __init__(
        self, reader: CheckpointReader, narrow: PreTrainedModel, wide: PreTrainedModel
    ) -> None:
        self._reader = reader
        self._narrow = layout.shapes_of(narrow)
        self._own = widenings(wide)
        self._absent = absent_values(wide, layout.read(narrow))
        self._path, layers = adapter_for(narrow.config).layer_list(narrow)
        self._layers = len(layers)
        self.specs = [
            TensorSpec(name, shape, dtype)
            for name, shape in layout.shapes_of(wide).items()
            if (dtype := self._dtype(name)) is not None
        ]

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a tensor is in."""
        if not name.startswith(f"{self._path}."):
            return None
        return int(name.removeprefix(f"{self._path}.").partition(".")[0])

    def pieces(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The elements in order, in pieces.

        Raises:
            InputError: the narrow model has it in another shape, and it is no Site's.
        """
        if self._narrow.get(spec.name) == spec.shape:
            yield from self._reader.pieces(spec.name)
        elif spec.name in self._absent:
            yield from _constant(spec, self._absent[spec.name])
        elif spec.name in self._own and spec.name in self._reader:
            yield self._own[spec.name](self._reader.get(spec.name), spec.shape)
        else:
            raise InputError(
                f"{spec.name}: would be {spec.shape} and is {self._narrow.get(spec.name)}, and "
                "belongs to no prunable structure: zeros there would change the function; load "
                "this folder with liar_ext.load"
            )

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The whole tensor; InputError as `pieces`."""
        return torch.cat([piece.flatten() for piece in self.pieces(spec)]).reshape(spec.shape)

    def _dtype(self, name: str) -> torch.dtype | None:
        """None of what no file has, as a head that is tied."""
        if name in self._reader:
            return self._reader.dtype(name)
        if self.layer_of(name) is None:
            return None
        rest = name.removeprefix(f"{self._path}.").partition(".")[2]
        same = (f"{self._path}.{index}.{rest}" for index in range(self._layers))
        like = next((n for n in same if n in self._reader), None)
        return self._reader.main_dtype() if like is None else self._reader.dtype(like)


def _constant(spec: TensorSpec, value: float) -> Iterator[Tensor]:
    left, most = prod(spec.shape), PIECE_BYTES // spec.dtype.itemsize
    while left > 0:
        yield torch.full((min(left, most),), value, dtype=spec.dtype)
        left -= most

"""A merged layer as a sum of layers of the source, and its tensors, piece by piece.

A merge of merges is a sum of layers of the source as well. Kept so, a model in the middle of a
search is a few numbers: its tensors are made when they are asked for, from the files or from the
model in memory, rounded once to the dtype they are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor, nn

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.depth.rules import BASE, RULES, norms_of

# elements of each layer that are summed at a time: 32 MiB of float64
PIECE = 1 << 22
# source layer -> what it is multiplied by, ascending, none of them 0
Terms = tuple[tuple[int, Fraction], ...]


@dataclass(frozen=True)
class Mixture:
    """One layer of a model with merged layers.

    Attributes:
        base: the source layer whose place, attention type and buffers it has.
        weights, norms: the sums that its parameters are, those of norms apart.
    """

    base: int
    weights: Terms
    norms: Terms

    @classmethod
    def of(cls, layer: int) -> Mixture:
        """A layer of the source as it is."""
        alone = ((layer, Fraction(1)),)
        return cls(layer, alone, alone)

    @property
    def plain(self) -> bool:
        return self == Mixture.of(self.base)

    def terms(self, name: str, norms: frozenset[str]) -> Terms:
        """The sum that a parameter is; norms: names of those that belong to norms."""
        return self.norms if name in norms else self.weights


def merged(layers: Sequence[Mixture], rule: str, norms_by: str) -> Mixture:
    """The base and the layers behind it as one layer.

    Args:
        rule: of `RULES`; norms_by: `auto`, `base` or `rule`.
    """
    coefficients = RULES[rule].coefficients(len(layers) - 1)
    weights = _sum(coefficients, [layer.weights for layer in layers])
    norms = _sum(coefficients, [layer.norms for layer in layers])
    base = layers[0]
    return Mixture(base.base, weights, base.norms if norms_of(rule, norms_by) == BASE else norms)


def _sum(coefficients: Sequence[Fraction], parts: Sequence[Terms]) -> Terms:
    found: dict[int, Fraction] = {}
    for coefficient, terms in zip(coefficients, parts, strict=True):
        for layer, factor in terms:
            found[layer] = found.get(layer, Fraction(0)) + coefficient * factor
    return tuple((layer, factor) for layer, factor in sorted(found.items()) if factor)


class Source(Protocol):
    """The parameters of the source's layers."""

    def pieces(self, layer: int, name: str) -> Iterator[Tensor]:
        """The elements of a parameter in order, flat, `PIECE` of them at a time."""

    def stored(self, layer: int, name: str) -> torch.dtype:
        """What they are stored in, and a merged layer in its place will be."""


class HeldSource:
    """Layers in memory.

    Args:
        stored: (layer, name) -> dtype of the file; None is the dtype in memory.
    """

    def __init__(
        self, layers: nn.ModuleList, stored: Callable[[int, str], torch.dtype] | None = None
    ) -> None:
        # not the list itself: a trial puts merged layers into it
        self._layers, self._stored = list(layers), stored

    def pieces(self, layer: int, name: str) -> Iterator[Tensor]:
        yield from self._layers[layer].get_parameter(name).detach().reshape(-1).split(PIECE)

    def stored(self, layer: int, name: str) -> torch.dtype:
        if self._stored is not None:
            return self._stored(layer, name)
        return self._layers[layer].get_parameter(name).dtype


class FiledSource:
    """Layers in files; `path` is that of their list in the model the reader is bound to."""

    def __init__(self, reader: CheckpointReader, path: str) -> None:
        self._reader, self._path = reader, path

    def pieces(self, layer: int, name: str) -> Iterator[Tensor]:
        full = f"{self._path}.{layer}.{name}"
        yield from self._reader.pieces(full, PIECE * self._reader.dtype(full).itemsize)

    def stored(self, layer: int, name: str) -> torch.dtype:
        return self._reader.dtype(f"{self._path}.{layer}.{name}")


def mixed(source: Source, mixture: Mixture, terms: Terms, name: str) -> Iterator[Tensor]:
    """The elements of a parameter of a merged layer in order, in the dtype it is stored in.

    Summed in float64 and rounded once; of a single layer they are its own, bit by bit.
    """
    dtype = source.stored(mixture.base, name)
    if len(terms) == 1 and terms[0][1] == 1:
        for piece in source.pieces(terms[0][0], name):
            yield piece.to(dtype)
        return
    # whole numbers of each and one division, as in the definition: 1/3 is no float
    below = math.lcm(*(factor.denominator for _, factor in terms))
    for pieces in zip(*(source.pieces(layer, name) for layer, _ in terms), strict=True):
        total = torch.zeros(pieces[0].shape, dtype=torch.float64, device=pieces[0].device)
        for (_, factor), piece in zip(terms, pieces, strict=True):
            total.add_(piece.double(), alpha=int(factor * below))
        yield total.div_(below).to(dtype)

"""Batch: what a model is run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liar_ext.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass.

    Attributes:
        input_ids: (b, t) int64.
        attention_mask: (b, t) bool, True for valid tokens.
        answers: (b, t) bool, True for tokens whose prediction counts in a loss; None where that of
            every token does.
        features: what a model is given that reads no tokens, by the names of its forward, (b, ...)
            each; `input_ids` are then zeros, one for each hidden state, all valid.
        cut: for an encoder-decoder, the first column that its decoder reads; those in front are its
            encoder's. 0 for all others.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor | None = None
    features: Mapping[str, Tensor] | None = None
    cut: int = 0

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise InputError(
                f"input_ids are {tuple(ids.shape)} {ids.dtype}; give a (b, t) int64 tensor"
            )
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise InputError(
                f"attention_mask is {tuple(mask.shape)} {mask.dtype}; give bool {tuple(ids.shape)}"
            )

    @classmethod
    def of_features(cls, features: Mapping[str, Tensor], length: int) -> Batch:
        """Of a model that makes `length` hidden states of each sample."""
        places = torch.zeros(len(next(iter(features.values()))), length, dtype=torch.int64)
        return cls(places, torch.ones_like(places, dtype=torch.bool), features=features)

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]]) -> Batch:
        """Of tokens, with padding behind, as the mask says; what it is made of is never seen."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = True
        return cls(ids, mask)

    @classmethod
    def of_pair(cls, source: Batch, target: Batch) -> Batch:
        """Of an encoder-decoder.

        Args:
            source: what the encoder reads; target: what the decoder does, from its start token on.
        Raises:
            InputError: not as many targets as sources, or no token of either.
        """
        shapes = tuple(source.input_ids.shape), tuple(target.input_ids.shape)
        if shapes[0][0] != shapes[1][0] or not (shapes[0][1] and shapes[1][1]):
            raise InputError(
                f"sources are {shapes[0]} and targets {shapes[1]} tokens; give as many rows of "
                "both, each with a token or more"
            )
        return cls(
            torch.cat((source.input_ids, target.input_ids), 1),
            torch.cat((source.attention_mask, target.attention_mask), 1),
            cut=source.input_ids.shape[1],
        )

    @property
    def parts(self) -> tuple[Batch, ...]:
        """What each stack reads: the encoder's and the decoder's tokens, or all of them."""
        if not self.cut:
            return (self,)
        return tuple(
            Batch(
                self.input_ids[:, own],
                self.attention_mask[:, own],
                None if self.answers is None else self.answers[:, own],
            )
            for own in (slice(self.cut), slice(self.cut, None))
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a stack reads, with padding."""
        return max(part.input_ids.shape[1] for part in self.parts)

    def given(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """What a model's forward is called with.

        Args:
            dtype: of features.
        """
        if self.features is not None:
            return {name: value.to(device, dtype) for name, value in self.features.items()}
        found: dict[str, Tensor | None] = {}
        for prefix, part in zip(("", "decoder_"), self.parts, strict=False):
            found[f"{prefix}input_ids"] = part.input_ids.to(device)
            found[f"{prefix}attention_mask"] = part.mask_on(device)
        return found

    def samples(self, which: slice) -> Batch:
        """Some of its samples, as long as they are here."""
        own = self.features
        return Batch(
            self.input_ids[which],
            self.attention_mask[which],
            None if self.answers is None else self.answers[which],
            None if own is None else {name: value[which] for name, value in own.items()},
            self.cut,
        )

    def rows(self, rows: Sequence[int] | Tensor) -> Batch:
        """Some of its sequences, without the columns on the right that are padding for all of
        them."""
        mask = self.attention_mask[rows]
        valid = mask.any(0).nonzero()
        length = int(valid.max()) + 1 if len(valid) else mask.shape[1]
        return Batch(
            self.input_ids[rows][:, :length],
            mask[:, :length],
            None if self.answers is None else self.answers[rows][:, :length],
            None
            if self.features is None
            else {name: value[rows] for name, value in self.features.items()},
            self.cut,
        )

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return int(self.attention_mask.sum())

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask on a device; None where all tokens are valid."""
        return None if bool(self.attention_mask.all()) else self.attention_mask.to(device)

    def valid_on(self, device: torch.device) -> Tensor | None:
        """Where valid tokens are in the flattened batch, (valid,) int64 on a device; None where all
        are.

        Found on the CPU, once: to index by a mask that is on a GPU waits for it, to find how many.
        """
        if bool(self.attention_mask.all()):
            return None
        return self.attention_mask.flatten().nonzero().flatten().to(device)


def shares(batches: Sequence[Batch]) -> tuple[float, ...]:
    """What share of the valid tokens each stack reads; `(1.0,)` where there is one stack."""
    read = [[part.tokens for part in batch.parts] for batch in batches]
    total = sum(map(sum, read))
    return tuple(sum(own) / total for own in zip(*read, strict=True)) if total else (1.0,)


def first_samples(batches: Sequence[Batch], samples: int) -> tuple[Batch, ...]:
    """The first `samples` samples of all batches, or as many as there are, in batches as before."""
    found: list[Batch] = []
    for batch in batches:
        if samples <= 0:
            break
        found.append(batch.samples(slice(samples)))
        samples -= len(batch.input_ids)
    return tuple(found)


def cut_to(batches: Sequence[Batch], least: int) -> tuple[Batch, ...]:
    """At least `least` batches where there are so many sequences: the same, fewer at a time."""
    if not batches or len(batches) >= least:
        return tuple(batches)
    pieces = -(-least // len(batches))
    found = []
    for batch in batches:
        places = torch.arange(len(batch.input_ids)).tensor_split(pieces)
        found += [batch.samples(slice(int(p[0]), int(p[-1]) + 1)) for p in places if len(p)]
    return tuple(found)

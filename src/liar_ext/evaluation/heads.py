"""Encoders with a head: texts as rows of tokens, and what the head says of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.evaluation.mode import check_ids, inference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a model is given of what a tokenizer makes
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Rows:
    """Texts as tokens: `ids`, a mapping of lists each; `truncated`, how many were cut."""

    ids: tuple[Mapping[str, list[int]], ...]
    truncated: int


def inputs_in(encoded: Any) -> list[str]:
    """The names of what a model may be given, of what a tokenizer has made."""
    return [name for name in _INPUTS if name in encoded]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], seq_len: int
) -> Rows:
    """Each text, or pair, with the tokenizer's special tokens, cut to `seq_len` from the longer
    side.

    Raises:
        InputError: there is no room for a token of the text beside the special ones.
    """
    first = [pair[0] for pair in texts]
    second = [pair[1] for pair in texts] if len(texts[0]) == 2 else None
    specials = tokenizer.num_special_tokens_to_add(pair=second is not None)
    if seq_len < specials + len(texts[0]):
        raise InputError(
            f"--seq-len {seq_len}: the tokenizer adds {specials} special tokens; give more"
        )
    found = tokenizer(first, second, truncation=True, max_length=seq_len, padding=False)
    whole = tokenizer(first, second, truncation=False, padding=False, verbose=False)["input_ids"]
    names = inputs_in(found)
    rows = tuple({name: found[name][i] for name in names} for i in range(len(texts)))
    return Rows(rows, sum(len(ids) > seq_len for ids in whole))


def batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, list[int]]],
    batch_size: int,
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Rows of like length together, the longest first, padded as the tokenizer pads; each with the
    places of its rows.

    Raises:
        InputError: the tokenizer has no pad token, or ids are outside the vocabulary.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no pad token; set pad_token in tokenizer_config.json")
    ids = [row["input_ids"] for row in rows]
    check_ids(model, min(map(min, ids)), max(map(max, ids)))
    takes = inspect.signature(model.forward).parameters
    order = sorted(range(len(rows)), key=lambda place: -len(ids[place]))
    found = []
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        own = [{n: v for n, v in rows[place].items() if n in takes} for place in places]
        padded: Any = tokenizer.pad(own, return_tensors="pt")
        found.append((places, dict(padded)))
    return found


def logits_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, list[int]]],
    batch_size: int,
) -> Tensor:
    """A classification head's logits, (rows, labels) float32 on the CPU, in the order given."""
    config: Any = model.config
    found = torch.empty(len(rows), config.num_labels)
    with inference(model) as device:
        for places, batch in batches(model, tokenizer, rows, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            found[places] = model(**inputs).logits.float().cpu()
    return found

"""Multiple-choice sets as tokens: a row for each option."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liar_ext.errors import InputError
from liar_ext.evaluation.choice_formats import Item
from liar_ext.evaluation.choices import ChoiceSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# texts in one call of the tokenizer
_TEXTS = 4096


@dataclass(frozen=True)
class Row:
    """One option as tokens. Attributes: `ids` of the text; `start` of the continuation in them."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """A set as tokens.

    Attributes:
        rows: options of the first item, then of the second, ...
        truncated: items of which some row lost the beginning of its context.
    """

    choices: ChoiceSet
    rows: tuple[Row, ...]
    truncated: int

    def items(self) -> Iterator[tuple[Item, tuple[Row, ...]]]:
        """Each item with its rows."""
        rows = iter(self.rows)
        for item in self.choices.items:
            yield item, tuple(itertools.islice(rows, len(item.choices)))


def encode(
    choices: ChoiceSet, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> EncodedSet:
    """The tokens of every option.

    Special tokens that the tokenizer puts in front of a text (BOS) stay, those behind it (EOS) are
    left off. A text that has neither a context nor a token in front of it gets the tokenizer's BOS,
    or its EOS, in front: its first token could not be scored otherwise. White space at the end
    of a context belongs to the continuation, and where the two meet inside of a token, that token
    does.

    Args:
        limit: tokens of a row at most; contexts lose their beginning, after the special tokens.
    Raises:
        InputError: a continuation alone is longer than `limit`, or there is no token to put in
            front.
    """
    contexts, texts = [], []
    for item in choices.items:
        contexts.append(item.context.rstrip())
        texts += [item.context + continuation for continuation in item.continuations()]
    fronts, wholes = _tokens(contexts, tokenizer), iter(_tokens(texts, tokenizer))
    rows: list[Row] = []
    truncated = 0
    for item, (context, _) in zip(choices.items, fronts, strict=True):
        own = [_row(item, context, *next(wholes), tokenizer, limit) for _ in item.choices]
        rows += [row for row, _ in own]
        truncated += any(cut for _, cut in own)
    return EncodedSet(choices, tuple(rows), truncated)


def _tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """For each text its ids without special tokens behind, and how many special ones are in front;
    of a text that is empty no ids."""
    found = []
    for begin in range(0, len(texts), _TEXTS):
        encoded = tokenizer(
            list(texts[begin : begin + _TEXTS]),
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            own = [place for place, flag in enumerate(special) if not flag]
            found.append((list(ids[: own[-1] + 1]), own[0]) if own else ([], 0))
    return found


def _row(
    item: Item,
    context: Sequence[int],
    ids: Sequence[int],
    specials: int,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> tuple[Row, bool]:
    """One option's row, and whether its context was cut."""
    same = (a == b for a, b in zip(context, ids, strict=False))
    start = max(specials, sum(itertools.takewhile(bool, same)))
    if start == len(ids):
        raise InputError(f"{item.where}: a choice has no tokens of its own; remove the question")
    if not start:
        front = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if front is None:
            raise InputError(
                f"{item.where}: nothing is in front of a choice, and the tokenizer has neither a "
                "BOS nor an EOS token to put there; give a context"
            )
        ids, start, specials = [front, *ids], 1, 1
    over = 0 if limit is None else max(0, len(ids) - limit)
    if start - over < max(1, specials):
        raise InputError(
            f"{item.where}: a choice has {len(ids) - start} tokens, and the window only {limit}; "
            "raise --seq-len if the model takes more, or remove the question"
        )
    return Row((*ids[:specials], *ids[specials + over :]), start - over), over > 0

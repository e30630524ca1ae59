"""Calibration of encoder-decoders: what is read, and what is written of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import (
    Calibration,
    calibration_of,
    check_sizes,
    draw,
    stream_windows,
    windows_of,
)
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# what a calibration is of
PAIRS, WINDOWS = "pairs of texts", "windows of text, cut in the middle"
INSTEAD = "pairs of texts (source, target), as the model is used on, say more"


def start_token(config: PretrainedConfig) -> int:
    """What a decoder's input begins with.

    Raises:
        InputError: the config names none.
    """
    for name in ("decoder_start_token_id", "pad_token_id"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    raise InputError("config.json: no decoder_start_token_id; add it")


def check_all_pairs(corpus: Corpus) -> None:
    """Raises InputError where some records are pairs and some are not."""
    if corpus.odd:
        raise InputError(
            f"{corpus.odd}: is no pair of texts, and others are; give source and target in every "
            "record, or in none"
        )


def pair_batches(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    start: int,
) -> Calibration:
    """Choose `samples` samples of a corpus by seed and batch them, for both stacks.

    Pairs: each is the encoder's text and the decoder's, truncated at `seq_len` tokens each, with
    their special tokens. Of plain text or a token file, windows of twice `seq_len` tokens are cut
    in two: the decoder goes on where the encoder's half ends, as in the adaptation of T5 to
    language modelling (Lester et al. 2021, "prefix LM"; Raffel et al. 2020, section 3.2.1).
    The decoder's input is its text shifted by one, behind the start token, as in training.

    Args:
        tokenizer: None is enough for a token file.
        start: see `start_token`; the others as of `batches.make_batches`.
    Raises:
        InputError: as `make_batches`; a token file with a mask; only some records are pairs.
    """
    check_sizes(samples, seq_len, batch_size)
    check_all_pairs(corpus)
    form = WINDOWS
    if corpus.tokens is not None:
        ids = corpus.tokens.input_ids
        if corpus.tokens.attention_mask is not None:
            raise InputError(
                f"{corpus.name}: an attention_mask says nothing of where the decoder begins; give "
                "windows without padding, or pairs of texts in a .jsonl (source, target)"
            )
        if ids.dim() == 1:
            ids, _ = stream_windows(corpus.name, ids, 2 * seq_len)
        drawn = draw(len(ids), samples, seed)
        batches = _halves(ids[drawn, : 2 * seq_len], batch_size, start)
    elif tokenizer is None:
        raise InputError(f"{corpus.name}: text needs a tokenizer and the model has none; add one")
    elif corpus.pairs:
        form, drawn = PAIRS, draw(len(corpus.pairs), samples, seed)
        chosen = [corpus.pairs[i] for i in drawn]
        batches = _pairs(chosen, tokenizer, seq_len, batch_size, start)
    else:
        windows, total = windows_of(corpus, tokenizer, samples, 2 * seq_len, seed)
        drawn = draw(total, samples, seed)
        batches = _halves(windows[drawn], batch_size, start)
    return calibration_of(
        *(corpus, batches, drawn),
        seed=seed,
        seq_len=seq_len,
        samples=samples,
        vocab_size=vocab_size,
        form=form,
    )


def _halves(windows: Tensor, batch_size: int, start: int) -> tuple[Batch, ...]:
    """Windows (n, t) cut in the middle."""
    source, target = windows.tensor_split(2, dim=1)
    return tuple(
        Batch.of_pair(_full(ids), _full(_shifted(following, start)))
        for ids, following in zip(source.split(batch_size), target.split(batch_size), strict=True)
    )


def _full(ids: Tensor) -> Batch:
    return Batch(ids.contiguous(), torch.ones_like(ids, dtype=torch.bool))


def _shifted(ids: Tensor, start: int) -> Tensor:
    return torch.cat((ids.new_full((len(ids), 1), start), ids[:, :-1]), 1)


def _pairs(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    batch_size: int,
    start: int,
) -> tuple[Batch, ...]:
    options = {"truncation": True, "max_length": seq_len, "padding": False}
    sources = tokenizer([source for source, _ in pairs], **options)["input_ids"]
    targets = tokenizer(text_target=[target for _, target in pairs], **options)["input_ids"]
    rows = [(s, [start, *t[:-1]]) for s, t in zip(sources, targets, strict=True) if s and t]
    # the longest first, so that a lack of memory shows at once
    rows.sort(key=lambda row: len(row[0]) + len(row[1]), reverse=True)
    batches = []
    for first in range(0, len(rows), batch_size):
        own = rows[first : first + batch_size]
        source, target = (Batch.of_rows([row[place] for row in own]) for place in (0, 1))
        batches.append(Batch.of_pair(source, target))
    return tuple(batches)

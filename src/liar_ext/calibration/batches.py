"""From a corpus to batches of tokens: full windows for decoders, padded sentences for encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.overlap import sketch
from liar_ext.calibration.sources import Corpus, TokenIds
from liar_ext.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SAMPLES = 128
RECOMMENDED_TOKENS_PER_COLUMN = 10
_FEW_TOKENS_PER_COLUMN = 5

# one tokenizer call; long enough that a word cut at its end does not matter, short enough to stop
_PIECE_CHARACTERS = 1 << 18
# windows to choose from for each one chosen, so that a large text is sampled widely
_POOL = 4
# characters a token covers in English; a wrong guess costs one more round, not a wrong result
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, eq=False)
class Calibration:
    """The batches, and what a report needs to say and to repeat about them.

    Attributes:
        batches: in the order in which they are run.
        source: the corpus as the user named it; empty where nothing was read.
        sha256: of the corpus.
        seed: chose the samples.
        seq_len: longest window, in tokens.
        requested: samples asked for; `samples` is smaller when the corpus has fewer.
        sample_ids: which windows (or sentences, or rows) of the corpus were chosen.
        sketch: of the corpus, to recognise it in an evaluation (see `overlap`).
        form: of an encoder-decoder, what the samples are (see `pairs`).
    """

    batches: tuple[Batch, ...]
    source: str
    sha256: str
    seed: int
    seq_len: int
    requested: int
    sample_ids: tuple[int, ...]
    sketch: tuple[str, ...]
    form: str = ""

    def __post_init__(self) -> None:
        if self.source and not self.tokens:
            raise InputError(f"{self.source}: no calibration tokens; give a longer text")

    @property
    def tokens(self) -> int:
        """Valid tokens in all batches."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def samples(self) -> int:
        """Windows or sentences in all batches."""
        return sum(batch.input_ids.shape[0] for batch in self.batches)

    def to_json(self) -> dict[str, Any]:
        """What the report keeps: everything but the tokens."""
        if not self.source:
            return {}
        return {
            "source": self.source,
            "sha256": self.sha256,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "requested_samples": self.requested,
            "samples": self.samples,
            "tokens": self.tokens,
            "sample_ids": list(self.sample_ids),
            "sketch": list(self.sketch),
            **({"form": self.form} if self.form else {}),
        }


# for what is done without tokens
NO_CALIBRATION = Calibration((), "", "", 0, 0, 0, (), ())


def make_batches(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    packed: bool,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
) -> Calibration:
    """Choose `samples` samples of a corpus by seed and batch them.

    packed (decoders): the documents, joined by blank lines, are one stream of tokens; samples are
    non-overlapping windows of exactly `seq_len` tokens, without padding or special tokens. Of a
    text much larger than needed, only pieces at random places are tokenised: enough for about four
    windows to choose from for each one chosen.
    not packed (encoders): samples are documents (lines, of a `.txt`), truncated at `seq_len` with
    their special tokens, sorted by length and padded in each batch to its longest; padding is
    False in the mask. The longest come first, so that a lack of memory shows at once.
    A token file is the same for both: a stream is cut into windows, 2-D windows are samples.

    Args:
        tokenizer: None is enough for a token file.
        samples: drawn without replacement; all are used when there are fewer.
        vocab_size: rows of the model's embedding; token ids must be below.
    Raises:
        InputError: a number below its minimum, no full window, no usable pad token, or token ids
            outside the vocabulary.
    """
    check_sizes(samples, seq_len, batch_size)
    if corpus.tokens is not None:
        drawn, ids = _from_token_file(corpus, corpus.tokens, samples, seq_len, seed)
        batches = _cut(drawn, batch_size)
    elif tokenizer is None:
        raise InputError(f"{corpus.name}: text needs a tokenizer and the model has none; add one")
    elif packed:
        windows, total = windows_of(corpus, tokenizer, samples, seq_len, seed)
        ids = draw(total, samples, seed)
        chosen = windows[ids]
        batches = _cut(Batch(chosen, torch.ones_like(chosen, dtype=torch.bool)), batch_size)
    else:
        sentences = corpus.sentences()
        ids = draw(len(sentences), samples, seed)
        batches = _padded([sentences[i] for i in ids], tokenizer, seq_len, batch_size)
    return calibration_of(
        corpus, batches, ids, seed=seed, seq_len=seq_len, samples=samples, vocab_size=vocab_size
    )


def calibration_of(
    corpus: Corpus,
    batches: tuple[Batch, ...],
    ids: Sequence[int],
    *,
    seed: int,
    seq_len: int,
    samples: int,
    vocab_size: int,
    form: str = "",
) -> Calibration:
    """What was drawn of a corpus; `ids`: see `Calibration.sample_ids`, the others `make_batches`.

    Raises:
        InputError: token ids outside the vocabulary.
    """
    _check_vocabulary(corpus.name, batches, vocab_size)
    return Calibration(
        batches=batches,
        source=corpus.name,
        sha256=corpus.sha256,
        seed=seed,
        seq_len=seq_len,
        requested=samples,
        sample_ids=tuple(ids),
        sketch=tuple(sketch(corpus)),
        form=form,
    )


def tokens_needed(width: int, tokens: int, held_out: int = 0) -> tuple[int, int]:
    """The least, and the recommended number of calibration tokens for a Site of `width` columns.

    Args:
        tokens: there are now, and of these `held_out` are not fitted to; of other numbers the same
            share would be.
    """
    share = 1.0 if held_out == 0 else tokens / max(tokens - held_out, 1)
    return math.ceil(width * share), math.ceil(RECOMMENDED_TOKENS_PER_COLUMN * width * share)


def check_enough(tokens: int, width: int, held_out: int = 0, whose: str = "") -> str | None:
    """Are there enough tokens to fit the widest Site?

    The covariance of `width` columns has full rank from about `width` tokens on; below that the
    interpolation is not determined by the data, and near it the fit is mostly noise.

    Args:
        held_out: of the tokens, those that the fits which choose a ridge do not see.
        whose: what they are of, where they are not all.
    Returns:
        A warning when less than `5 width` are fitted to, else None.
    Raises:
        InputError: less than `width` are.
    """
    least, recommended = tokens_needed(width, tokens, held_out)
    advice = (
        f"at least {least} are needed and {recommended} recommended; "
        "raise --samples or --seq-len, or give a longer text"
    )
    if held_out:
        advice = f"{held_out} are held out for --ridge auto; {advice}"
    fitted = tokens - held_out
    if fitted < width:
        raise InputError(f"{tokens} calibration tokens{whose} for {width} columns: {advice}")
    if fitted < _FEW_TOKENS_PER_COLUMN * width:
        return f"only {tokens} calibration tokens{whose} for {width} columns: {advice}"
    return None


def of_stack(stack: int, stacks: int, tokens: int) -> str:
    """Whose tokens are meant, in a message, where each stack has its own; `tokens`: of both."""
    return f" of the {('encoder', 'decoder')[stack]} ({tokens} in all)" if stacks > 1 else ""


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    """The token ids of a text of any length, without the warning about the model's limit."""
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        truncation=False,
        padding=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def draw(available: int, samples: int, seed: int) -> list[int]:
    """`samples` indices below `available`, without replacement; a prefix of one permutation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:samples].tolist()


def check_sizes(samples: int, seq_len: int, batch_size: int) -> None:
    """Raises InputError where one is below its minimum."""
    for flag, value, least in (
        ("--samples", samples, 1),
        ("--seq-len", seq_len, 2),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise InputError(f"{flag} {value} is too small; give at least {least}")


def windows_of(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> tuple[Tensor, int]:
    """The windows to choose from, (windows, seq_len) int64, and how many there are."""
    pieces = _pieces(corpus.documents)
    order = draw(len(pieces), len(pieces), seed)
    ids: dict[int, list[int]] = {}
    needed = _POOL * samples * seq_len * _CHARACTERS_PER_TOKEN
    characters = 0
    for position in order:
        if characters >= needed and sum(map(len, ids.values())) >= samples * seq_len:
            break
        ids[position] = encode(pieces[position], tokenizer, special=False)
        characters += len(pieces[position])
    # in the order of the text, so that a text tokenised whole is one continuous stream
    stream = [token for position in sorted(ids) for token in ids[position]]
    return stream_windows(corpus.name, torch.tensor(stream, dtype=torch.int64), seq_len)


def stream_windows(name: str, stream: Tensor, seq_len: int) -> tuple[Tensor, int]:
    """A stream of tokens cut into windows (windows, seq_len), and how many there are.

    Raises:
        InputError: it is shorter than one.
    """
    windows = stream.numel() // seq_len
    if not windows:
        raise InputError(
            f"{name}: {stream.numel()} tokens, and one window needs {seq_len}; "
            "give a longer text or lower --seq-len"
        )
    return stream[: windows * seq_len].view(windows, seq_len), windows


def _pieces(documents: Sequence[str]) -> list[str]:
    """The documents joined by blank lines, cut into pieces of at most `_PIECE_CHARACTERS`."""
    text = "\n\n".join(documents)
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        # before a newline, else before a space, else anywhere: no word is cut if it can be helped
        stop = max(text.rfind("\n", start + 1, limit), start)
        if stop == start:
            stop = max(text.rfind(" ", start + 1, limit), start)
        if stop == start:
            stop = limit
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _padded(
    sentences: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, batch_size: int
) -> tuple[Batch, ...]:
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no pad token; set pad_token in tokenizer_config.json")
    encoded = tokenizer(sentences, truncation=True, max_length=seq_len, padding=False)["input_ids"]
    # stable, so that equal lengths stay in the order drawn
    rows = sorted((row for row in encoded if row), key=len, reverse=True)
    batches = []
    for start in range(0, len(rows), batch_size):
        # the mask comes from the lengths: a pad token may also be a valid one
        padded = tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt")
        batches.append(Batch(padded["input_ids"].long(), padded["attention_mask"].bool()))
    return tuple(batches)


def _from_token_file(
    corpus: Corpus, tokens: TokenIds, samples: int, seq_len: int, seed: int
) -> tuple[Batch, list[int]]:
    ids = tokens.input_ids
    if ids.dim() == 1:
        ids, _ = stream_windows(corpus.name, ids, seq_len)
    drawn = draw(ids.shape[0], samples, seed)
    chosen = ids[drawn, :seq_len]
    mask = torch.ones_like(chosen, dtype=torch.bool)
    if tokens.attention_mask is not None:
        mask = tokens.attention_mask[drawn, :seq_len]
        # a window padded on the left may lose all its valid tokens at seq_len; attention over a
        # row without any gives NaN
        rows = mask.any(1).nonzero().flatten()
        chosen, mask, drawn = chosen[rows], mask[rows], [drawn[row] for row in rows.tolist()]
        # the same order as for sentences, so that short windows share a short batch
        order = mask.sum(1).argsort(descending=True, stable=True)
        chosen, mask = chosen[order], mask[order]
    return Batch(chosen, mask), drawn


def _cut(samples: Batch, batch_size: int) -> tuple[Batch, ...]:
    """Split along the batch, and drop columns on the right that are padding for a whole batch."""
    batches: list[Batch] = []
    if not samples.input_ids.numel():
        return ()
    for ids, mask in zip(
        samples.input_ids.split(batch_size), samples.attention_mask.split(batch_size), strict=True
    ):
        length = int(mask.any(0).nonzero().max()) + 1
        batches.append(Batch(ids[:, :length].contiguous(), mask[:, :length].contiguous()))
    return tuple(batches)


def _check_vocabulary(name: str, batches: Sequence[Batch], vocab_size: int) -> None:
    for batch in batches:
        highest = int(batch.input_ids.max())
        if highest >= vocab_size:
            raise InputError(
                f"{name}: token id {highest} is outside the model's vocabulary of {vocab_size}; "
                "use the model's own tokenizer"
            )

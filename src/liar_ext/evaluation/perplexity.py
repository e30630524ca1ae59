"""Perplexity by the field's protocol: non-overlapping windows, next-token loss inside each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liar_ext.calibration.batches import encode
from liar_ext.errors import InputError
from liar_ext.evaluation import estimate
from liar_ext.evaluation.mode import check_ids, inference, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# float32 logits of one chunk: 256 MiB. a vocabulary of 128k takes 2 GiB for 4096 tokens otherwise
CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, with what is needed to repeat and to judge it.

    Attributes:
        perplexity: `exp(loss)`; at most `exp(700)`, beyond which a float ends.
        loss: mean over the predicted tokens, in nats.
        tokens: predicted tokens, `windows · (seq_len − 1)`.
        windows: full windows; a last partial one is dropped.
        seq_len: tokens in a window.
        standard_error: of `loss`, from the spread of the windows' means, in nats; None for a
            single window. The perplexity's own is about `perplexity · standard_error`. It says how
            much depends on the choice of text; a difference between two models on the same text is
            more certain than that.
        seconds: wall-clock time of the forward passes and the loss.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    standard_error: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The whole text as one stream, (n,) int64, in one tokenizer call.

    Special tokens are added as the tokenizer does by default (a LLaMA stream begins with one
    BOS): published numbers are computed so.
    """
    return torch.tensor(encode(text, tokenizer, special=True), dtype=torch.int64)


def perplexity(
    model: nn.Module, token_ids: Tensor, seq_len: int, batch_size: int = 1
) -> PerplexityResult:
    """Perplexity of a causal language model on one stream of tokens.

    Args, Raises: as `window_losses`.
    """
    start = time.perf_counter()
    means = window_losses(model, token_ids, seq_len, batch_size)
    return result_of(means, seq_len, time.perf_counter() - start)


def window_losses(model: nn.Module, token_ids: Tensor, seq_len: int, batch_size: int = 1) -> Tensor:
    """The mean next-token loss of every window, in nats, (windows,) float64.

    The stream is cut into non-overlapping windows of `seq_len` tokens; in each, tokens 2 to
    `seq_len` are predicted from those before them, so a window has `seq_len − 1` targets. The
    log-softmax is taken in float32, in chunks of positions, and summed in float64.

    Args:
        model: called as `model(input_ids=...)`, returns `.logits` (b, t, vocabulary).
        token_ids: (n,) int64.
    Raises:
        InputError: the text is shorter than one window, an id is outside the vocabulary, the
            window is longer than the model's limit, or the loss is not finite.
    Source:
        The WikiText-2 protocol of GPTQ (Frantar et al., 2022), SparseGPT and their successors.
    """
    windows = cut(token_ids, seq_len, batch_size)
    check_model(model, windows)
    with inference(model) as device:
        sums = [
            _window_losses(model, window.to(device)).cpu() for window in windows.split(batch_size)
        ]
    means = torch.cat(sums) / (seq_len - 1)
    check_windows(means[None])
    return means


def result_of(means: Tensor, seq_len: int, seconds: float) -> PerplexityResult:
    """The perplexity of windows' mean losses."""
    found = estimate.perplexity(means.numpy())
    loss, windows = float(means.mean()), len(means)
    return PerplexityResult(
        perplexity=found.value,
        loss=loss,
        tokens=windows * (seq_len - 1),
        windows=windows,
        seq_len=seq_len,
        standard_error=float(means.std() / windows**0.5) if windows > 1 else None,
        seconds=seconds,
    )


def cut(token_ids: Tensor, seq_len: int, batch_size: int) -> Tensor:
    """The full windows of a stream, (windows, seq_len).

    Raises:
        InputError: there is none, or a number is too small.
    """
    for flag, value, least in (("--seq-len", seq_len, 2), ("--batch-size", batch_size, 1)):
        if value < least:
            raise InputError(f"{flag} {value} is too small; give at least {least}")
    windows = token_ids.numel() // seq_len
    if not windows:
        raise InputError(
            f"the evaluation text has {token_ids.numel()} tokens, and one window needs {seq_len}; "
            "give a longer text or shorter windows (--seq-len; of liar compare --eval-seq-len)"
        )
    return token_ids[: windows * seq_len].view(windows, seq_len)


def check_model(model: nn.Module, windows: Tensor) -> None:
    """Raises InputError where a model cannot take windows, (windows, seq_len)."""
    check_ids(model, int(windows.min()), int(windows.max()))
    limit = positions_of(model)
    if limit is not None and windows.shape[1] > limit:
        raise InputError(
            f"--seq-len {windows.shape[1]} is beyond the model's limit of {limit} positions; "
            f"give at most {limit}"
        )


def check_windows(columns: Tensor) -> None:
    """Raises InputError where a window's mean loss, or another mean, (kinds, windows), is not
    finite."""
    bad = (~columns.isfinite()).any(0).nonzero().flatten()
    if bad.numel():
        index = int(bad[0])
        own = columns[:, index]
        raise InputError(
            f"the loss of window {index} of {columns.shape[1]} is "
            f"{float(own[~own.isfinite()][0])}; "
            "the model's weights or its dtype are broken: try --dtype float32"
        )


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """(b, t, vocabulary).

    Raises:
        InputError: the model has none.
    """
    # transformers would otherwise keep keys and values that nothing reads
    kwargs = {"use_cache": False} if hasattr(model, "config") else {}
    logits = getattr(model(input_ids=input_ids, **kwargs), "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} has no logits; give a causal language model")
    return logits


def positions(logits: Tensor) -> Iterator[slice]:
    """The positions that predict a token, in chunks whose float32 logits fit into 256 MiB."""
    batch, length, vocabulary = logits.shape
    step = max(1, CHUNK_LOGITS // (batch * vocabulary))
    for begin in range(0, length - 1, step):
        yield slice(begin, min(begin + step, length - 1))


def _window_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Summed next-token loss of each window, (b,) float64."""
    logits = logits_of(model, input_ids)
    batch = len(input_ids)
    total = torch.zeros(batch, dtype=torch.float64, device=logits.device)
    for part in positions(logits):
        targets = input_ids[:, part.start + 1 : part.stop + 1].to(logits.device)
        losses = F.cross_entropy(
            logits[:, part].float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        total += losses.view(batch, -1).double().sum(1)
    return total

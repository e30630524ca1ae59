"""Perplexity by the field's protocol: non-overlapping windows, next-token loss inside each."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liar_ext.calibration.batches import encode
from liar_ext.errors import InputError
from liar_ext.evaluation.mode import check_ids, inference, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# float32 logits of one chunk: 256 MiB. a vocabulary of 128k takes 2 GiB for 4096 tokens otherwise
_CHUNK_LOGITS = 1 << 26


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
    for flag, value, least in (("--seq-len", seq_len, 2), ("--batch-size", batch_size, 1)):
        if value < least:
            raise InputError(f"{flag} {value} is too small; give at least {least}")
    windows = token_ids.numel() // seq_len
    if not windows:
        raise InputError(
            f"the evaluation text has {token_ids.numel()} tokens, and one window needs {seq_len}; "
            "give a longer text or shorter windows (--seq-len; of liar compare --eval-seq-len)"
        )
    token_ids = token_ids[: windows * seq_len].view(windows, seq_len)
    _check_model(model, token_ids)
    start = time.perf_counter()
    with inference(model) as device:
        sums = [
            _window_losses(model, window.to(device)).cpu() for window in token_ids.split(batch_size)
        ]
    means = torch.cat(sums) / (seq_len - 1)
    seconds = time.perf_counter() - start
    bad = (~means.isfinite()).nonzero().flatten()
    if bad.numel():
        index = int(bad[0])
        raise InputError(
            f"the loss of window {index} of {windows} is {float(means[index])}; "
            "the model's weights or its dtype are broken: try --dtype float32"
        )
    loss = float(means.mean())
    return PerplexityResult(
        perplexity=math.exp(min(loss, 700.0)),
        loss=loss,
        tokens=windows * (seq_len - 1),
        windows=windows,
        seq_len=seq_len,
        standard_error=float(means.std() / windows**0.5) if windows > 1 else None,
        seconds=seconds,
    )


def _check_model(model: nn.Module, token_ids: Tensor) -> None:
    check_ids(model, int(token_ids.min()), int(token_ids.max()))
    limit = positions_of(model)
    if limit is not None and token_ids.shape[1] > limit:
        raise InputError(
            f"--seq-len {token_ids.shape[1]} is beyond the model's limit of {limit} positions; "
            f"give at most {limit}"
        )


def _window_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Summed next-token loss of each window, (b,) float64."""
    # transformers would otherwise keep keys and values that nothing reads
    kwargs = {"use_cache": False} if hasattr(model, "config") else {}
    logits = model(input_ids=input_ids, **kwargs).logits
    batch, length, vocabulary = logits.shape
    total = torch.zeros(batch, dtype=torch.float64, device=logits.device)
    step = max(1, _CHUNK_LOGITS // (batch * vocabulary))
    for begin in range(0, length - 1, step):
        end = min(begin + step, length - 1)
        targets = input_ids[:, begin + 1 : end + 1].to(logits.device)
        losses = F.cross_entropy(
            logits[:, begin:end].float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        total += losses.view(batch, -1).double().sum(1)
    return total

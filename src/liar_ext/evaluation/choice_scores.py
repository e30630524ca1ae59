"""What a causal language model thinks of the choices of a set: one forward, three protocols.

Each option of an item is one row of tokens, context and continuation, scored without regard to any
other row. With `ℓ_t` the loss of token t given those before it, in nats:

- `accuracy`: the option with the largest log-likelihood `−Σ ℓ_t` over the continuation's tokens;
- `accuracy_norm`: the same over the continuation's length in characters, without the space in
  front of it;
- `accuracy_ppl`: the option whose whole text, context included, has the lowest *text loss*: the sum
  of all `ℓ_t`, over the number of tokens.

The first two are `acc` and `acc_norm` of EleutherAI's lm-evaluation-harness (`process_results` of
its multiple-choice tasks; the continuation is what the tokens of context + continuation have more
than those of the context). The third is the PPL mode of OpenCompass (`PPLInferencer`, and `get_ppl`
of its Hugging Face models without `mask_length`): what is called PPL there, and kept under that
name in its prediction files, is the mean loss and not its exponential, and it divides the `n − 1`
losses of a text by `n`, for the first token has none. Both are done so here. The first option wins
a tie in all three.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from liar_ext.errors import InputError
from liar_ext.evaluation.choice_tokens import EncodedSet, Row
from liar_ext.evaluation.choices import ChoiceSet
from liar_ext.evaluation.mode import check_ids, inference, positions_of
from liar_ext.evaluation.perplexity import CHUNK_LOGITS


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What a model gives the options of a set; (items, most options) float64 on the CPU, NaN where
    an item has fewer options.

    Attributes:
        text_loss: of the whole text, in nats a token: what OpenCompass calls PPL.
        log_likelihood: of the continuation, in nats.
        characters: length of the continuation.
        answers: (items,) int64, the right options.
        seconds: wall-clock time of the forward passes and losses.
    """

    text_loss: Tensor
    log_likelihood: Tensor
    characters: Tensor
    answers: Tensor
    seconds: float

    def correct(self) -> dict[str, Tensor]:
        """Which items are answered right, (items,) bool, by protocol."""
        better = {
            "accuracy": self.log_likelihood,
            "accuracy_norm": self.log_likelihood / self.characters,
            "accuracy_ppl": -self.text_loss,
        }
        return {name: _first_best(score) == self.answers for name, score in better.items()}


@dataclass(frozen=True)
class ChoicesResult:
    """Accuracies in percent, with what is needed to judge them.

    Attributes:
        accuracy, accuracy_norm, accuracy_ppl: see the module.
        standard_error, standard_error_norm, standard_error_ppl: of the three, in percent: the
            sample deviation of right and wrong over the root of the items; None for one item. A
            difference between two models on the same items is more certain than that.
        chance: what a blind choice gets, in percent.
        items: questions; truncated: those whose context was cut to fit the model.
        format: of the records; sha256: of their file.
        seconds: wall-clock time of the forward passes and losses.
    """

    accuracy: float
    accuracy_norm: float
    accuracy_ppl: float
    standard_error: float | None
    standard_error_norm: float | None
    standard_error_ppl: float | None
    chance: float
    items: int
    truncated: int
    format: str
    sha256: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score(model: nn.Module, encoded: EncodedSet, batch_size: int) -> ChoiceScores:
    """Losses of every option of a set.

    Rows that differ in their last token alone (letters to choose from) share a forward: the last
    token is never an input. Batches are padded on the right, under an attention mask; the
    log-softmax is taken in float32, in chunks of positions, and losses are summed in float64.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)`, returns `.logits`
            (b, t, vocabulary), each position seeing the ones before it only.
        batch_size: sequences in a forward.
    Raises:
        InputError: an id is outside the vocabulary, a row is longer than the model's limit, the
            model has no logits, or a loss is not finite.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is too small; give at least 1")
    rows = encoded.rows
    check_ids(model, min(min(row.ids) for row in rows), max(max(row.ids) for row in rows))
    longest, limit = max(len(row.ids) for row in rows), positions_of(model)
    if limit is not None and longest > limit:
        raise InputError(
            f"a question with its answer has {longest} tokens, beyond the model's limit of {limit} "
            f"positions; encode with a limit of at most {limit}"
        )
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        owners.setdefault(row.ids[:-1], []).append(index)
    # the longest first: memory runs out at once or not at all
    inputs = sorted(owners, key=len, reverse=True)
    text = torch.empty(len(rows), dtype=torch.float64)
    continuation = torch.empty_like(text)
    start = time.perf_counter()
    with inference(model) as device:
        for begin in range(0, len(inputs), batch_size):
            batch = inputs[begin : begin + batch_size]
            indices = [index for one in batch for index in owners[one]]
            which = [place for place, one in enumerate(batch) for _ in owners[one]]
            losses = _losses(model, batch, which, [rows[index] for index in indices], device)
            text[indices], continuation[indices] = losses[0].cpu(), losses[1].cpu()
    seconds = time.perf_counter() - start
    text /= torch.tensor([len(row.ids) for row in rows])
    return _gathered(encoded.choices, text, -continuation, seconds)


def result_of(encoded: EncodedSet, scores: ChoiceScores) -> ChoicesResult:
    """The accuracies of one model on one set."""
    items = len(encoded.choices.items)
    values: dict[str, Any] = {}
    for name, correct in scores.correct().items():
        found = 100 * correct.double()
        values[name] = float(found.mean())
        error = float(found.std() / items**0.5) if items > 1 else None
        values[name.replace("accuracy", "standard_error")] = error
    return ChoicesResult(
        **values,
        chance=100 * encoded.choices.chance,
        items=items,
        truncated=encoded.truncated,
        format=encoded.choices.format,
        sha256=encoded.choices.sha256,
        seconds=scores.seconds,
    )


def _losses(
    model: nn.Module,
    inputs: Sequence[Sequence[int]],
    owners: Sequence[int],
    rows: Sequence[Row],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Summed losses of rows, of the whole text and of the continuation; (rows,) float64 each.

    Args:
        inputs: sequences of a batch; owners: for each row the sequence that is all of it but its
            last token.
    """
    width = max(map(len, inputs))
    ids = torch.zeros(len(inputs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, sequence in enumerate(inputs):
        ids[place, : len(sequence)] = torch.tensor(sequence)
        mask[place, : len(sequence)] = 1
    targets = torch.zeros(len(rows), width, dtype=torch.int64)
    # 1 from the first token that counts to the last
    whole, own = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for place, row in enumerate(rows):
        count = len(row.ids) - 1
        targets[place, :count] = torch.tensor(row.ids[1:])
        whole[place, :count] = True
        own[place, row.start - 1 : count] = True
    # transformers would otherwise keep keys and values that nothing reads
    kwargs = {"use_cache": False} if hasattr(model, "config") else {}
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), **kwargs)
    logits = getattr(out, "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} has no logits; give a causal language model")
    owner = torch.tensor(owners, device=logits.device)
    targets, whole, own = (tensor.to(logits.device) for tensor in (targets, whole, own))
    text = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
    continuation = torch.zeros_like(text)
    step = max(1, CHUNK_LOGITS // (len(inputs) * logits.shape[-1]))
    for begin in range(0, width, step):
        part = slice(begin, begin + step)
        chunk = logits[:, part].float()
        columns = torch.arange(chunk.shape[1], device=chunk.device)
        found = chunk[owner[:, None], columns, targets[:, part]]
        losses = (chunk.logsumexp(-1)[owner] - found).double()
        # not a product: what a model makes of padding need not be a number
        text += losses.where(whole[:, part], 0.0).sum(1)
        continuation += losses.where(own[:, part], 0.0).sum(1)
    return text, continuation


def _gathered(
    choices: ChoiceSet, text: Tensor, log_likelihood: Tensor, seconds: float
) -> ChoiceScores:
    """Rows as (items, most options); refuses what is no number before NaN means no option."""
    bad = (~(text.isfinite() & log_likelihood.isfinite())).nonzero().flatten()
    counts = [len(item.choices) for item in choices.items]
    if bad.numel():
        ends = list(itertools.accumulate(counts))
        item = choices.items[bisect.bisect_right(ends, int(bad[0]))]
        raise InputError(
            f"{item.where}: the loss of an option is {float(text[bad[0]])}; the model's weights or "
            "its dtype are broken: try --dtype float32"
        )
    lengths = [len(choice) for item in choices.items for choice in item.choices]

    def table(rows: Tensor) -> Tensor:
        return pad_sequence(list(rows.split(counts)), batch_first=True, padding_value=math.nan)

    return ChoiceScores(
        text_loss=table(text),
        log_likelihood=table(log_likelihood),
        characters=table(torch.tensor(lengths, dtype=torch.float64)),
        answers=torch.tensor([item.answer for item in choices.items]),
        seconds=seconds,
    )


def _first_best(scores: Tensor) -> Tensor:
    """The column of the largest score in each row, the first of several; NaN is none."""
    return scores.nan_to_num(nan=-math.inf).argmax(1)

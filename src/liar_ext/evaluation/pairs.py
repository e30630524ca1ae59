"""What an encoder-decoder makes of pairs of texts: the loss of each target, given its source.

With targets y of n tokens, their end included, and the source x,

    loss = −1/n Σ_i log p(y_i | y_<i, x)          in nats a token
    top1 = share of the y_i that the model thinks most likely there, percent

the decoder being given what it is to write (teacher forcing). A target is a unit: figures are means
over targets, and the perplexity is `exp` of the mean loss.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.pairs import check_all_pairs
from liar_ext.calibration.sources import Corpus, read
from liar_ext.engine.loss import NO_TARGET
from liar_ext.errors import InputError
from liar_ext.evaluation import estimate
from liar_ext.evaluation.measured import Dense, Measured
from liar_ext.evaluation.mode import check_ids, inference
from liar_ext.evaluation.perplexity import CHUNK_LOGITS, check_windows
from liar_ext.evaluation.task import Evaluation


@dataclass(frozen=True)
class Pairs:
    """Attributes: `texts`, a Corpus with pairs."""

    texts: Corpus

    def corpus(self) -> Corpus:
        """The texts, for `calibration.overlap`."""
        return self.texts


def read_pairs(path: str) -> Pairs:
    """Pairs of texts.

    Raises:
        InputError: the source cannot be read, or has no pairs, or records that are none.
    """
    corpus = read(path)
    check_all_pairs(corpus)
    if not corpus.pairs:
        raise InputError(
            f"{path}: has no pairs of texts; give a .jsonl whose lines have the fields source and "
            "target, or NAME:CONFIG:SPLIT:SOURCE>TARGET of a data set"
        )
    return Pairs(corpus)


class PairsMeasure:
    """Losses of targets.

    Raises:
        InputError: no pairs, or one without tokens; called, a model without logits of targets, or
            that has not these tokens.
    """

    def __init__(self, evaluation: Evaluation, tokenizer: Any, data: Pairs | None = None) -> None:
        assert evaluation.length is not None, "the metric has one of its own"
        self.evaluation = evaluation
        corpus = (read_pairs(evaluation.path) if data is None else data).texts
        options = {"truncation": True, "max_length": evaluation.length, "padding": False}
        sources, targets = zip(*corpus.pairs, strict=True)
        self._sources: list[list[int]] = tokenizer(list(sources), **options)["input_ids"]
        self._targets: list[list[int]] = tokenizer(text_target=list(targets), **options)[
            "input_ids"
        ]
        for place, (source, target) in enumerate(zip(self._sources, self._targets, strict=True)):
            if not source or not target:
                raise InputError(f"{evaluation.path}: pair {place} has no tokens; remove it")
        self.facts = {
            "dataset": evaluation.path,
            "sha256": corpus.sha256,
            "pairs": len(corpus.pairs),
            "seq_len": evaluation.length,
        }

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self._sources, self._targets)).encode()).hexdigest()

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        every = [token for rows in (self._sources, self._targets) for row in rows for token in row]
        check_ids(model, min(every), max(every))
        start = time.perf_counter()
        # the longest first, so that a lack of memory shows at once; told in the order of the file
        order = sorted(range(len(self._sources)), key=self._length, reverse=True)
        found = torch.zeros(2, len(order), dtype=torch.float64)
        size = self.evaluation.batch_size
        with inference(model) as device:
            for first in range(0, len(order), size):
                own = order[first : first + size]
                found[:, own] = self._batch(model, own, device).cpu()
        check_windows(found)
        losses, top1 = found
        return Measured(
            {
                "perplexity": estimate.perplexity(losses.numpy(), "targets"),
                "top1_accuracy": estimate.mean(100 * top1.numpy(), "targets", low=0, high=100),
            },
            "targets",
            {
                **self.facts,
                "loss": float(losses.mean()),
                "tokens": sum(map(len, self._targets)),
                "seconds": time.perf_counter() - start,
            },
        )

    def _length(self, place: int) -> int:
        return len(self._sources[place]) + len(self._targets[place])

    def _batch(self, model: nn.Module, own: Sequence[int], device: torch.device) -> Tensor:
        """Mean loss and share of right tokens of each target, (2, b) float64."""
        source = Batch.of_rows([self._sources[place] for place in own])
        target = Batch.of_rows([self._targets[place] for place in own])
        labels = target.input_ids.masked_fill(~target.attention_mask, NO_TARGET).to(device)
        output = model(
            input_ids=source.input_ids.to(device),
            attention_mask=source.attention_mask.to(device),
            # transformers shifts them and puts the start token in front, as in training
            labels=labels,
            use_cache=False,
        )
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape[:2] != labels.shape:
            raise InputError(
                f"{type(model).__name__} has no logits of targets; give a model of a class "
                "...ForConditionalGeneration"
            )
        labels, (batch, length, vocabulary) = labels.to(logits.device), logits.shape
        total = torch.zeros(2, batch, dtype=torch.float64, device=logits.device)
        step = max(1, CHUNK_LOGITS // (batch * vocabulary))
        for first in range(0, length, step):
            part, wanted = logits[:, first : first + step].float(), labels[:, first : first + step]
            losses = F.cross_entropy(
                part.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=NO_TARGET
            )
            right = part.argmax(-1) == wanted
            total += torch.stack([losses.view(batch, -1).double().sum(1), right.double().sum(1)])
        return total / (labels != NO_TARGET).sum(1)

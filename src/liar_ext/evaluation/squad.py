"""SQuAD: spans of a context that an encoder with a question-answering head points at.

A question and a context longer than a window are cut into windows that overlap; each window has a
logit for every token to be the first, and to be the last, of the answer. Of each window the
`N_BEST` best firsts and lasts are paired, of the pairs whose last is not in front of the first and
that are at most `LONGEST` tokens long, inside of the context, the one with the largest sum counts,
and of all windows the best. With version 2, "no answer" has in each window the sum of the two
logits of [CLS], of all windows the smallest; it is the answer where that is above the best span's
by more than a threshold.

Source: Devlin et al., arXiv 1810.04805 (section 4.2, 4.3), and the conventions of `run_squad.py`,
which transformers' examples keep: windows of 384 tokens, a third of them overlapping, 20, 30, 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.errors import InputError
from liar_ext.evaluation import estimate, heads
from liar_ext.evaluation.measured import Dense, Measured
from liar_ext.evaluation.mode import inference
from liar_ext.evaluation.squad_metrics import scores
from liar_ext.evaluation.squad_sets import Question, SquadSet, read_squad
from liar_ext.evaluation.task import Evaluation

N_BEST, LONGEST = 20, 30
# questions in one call of the tokenizer
_QUESTIONS = 1024


@dataclass(frozen=True, eq=False)
class Window:
    """A part of one question's context.

    Attributes:
        owner: place of the question.
        row: what the model is given.
        spans: for each token its characters in the context; None outside of the context.
        null: place of the token whose logits say that there is no answer.
    """

    owner: int
    row: Mapping[str, list[int]]
    spans: tuple[tuple[int, int] | None, ...]
    null: int


@dataclass
class _Found:
    """The best span of a question so far, and what speaks for none."""

    score: float = -np.inf
    span: tuple[int, int] | None = None
    null: float = np.inf


class SquadMeasure:
    """F1 and exact match, × 100."""

    def __init__(
        self, evaluation: Evaluation, tokenizer: Any, data: SquadSet | None = None
    ) -> None:
        assert evaluation.length is not None, "the metric has one of its own"
        self.data = read_squad(evaluation.path) if data is None else data
        self.evaluation, self.tokenizer = evaluation, tokenizer
        self.stride = evaluation.length // 3
        self.windows = list(
            windows_of(self.data.questions, tokenizer, evaluation.length, self.stride)
        )
        self.key = self.data.sha256

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        start = time.perf_counter()
        answers = self.answers(model)
        version, questions = self.data.version, self.data.questions
        found = [scores(a, q.answers, version) for a, q in zip(answers, questions, strict=True)]
        exact = np.array([one for one, _ in found])
        f1 = np.array([100 * one for _, one in found])
        details: dict[str, Any] = {
            "dataset": self.evaluation.path,
            "sha256": self.data.sha256,
            "squad_version": version,
            "questions": len(questions),
            "windows": len(self.windows),
            "seq_len": self.evaluation.length,
            "stride": self.stride,
        }
        if version == 2:
            answerable = np.array([bool(question.answers) for question in questions])
            details["null_threshold"] = self.evaluation.null_threshold
            for name, which in (("has_answer", answerable), ("no_answer", ~answerable)):
                count = int(which.sum())
                details[name] = {
                    "questions": count,
                    "f1": float(f1[which].mean()) if count else None,
                    "exact_match": 100 * float(exact[which].mean()) if count else None,
                }
        return Measured(
            {
                "f1": estimate.mean(f1, "questions", low=0, high=100),
                "exact_match": estimate.share(exact),
            },
            "questions",
            {**details, "seconds": time.perf_counter() - start},
        )

    def answers(self, model: nn.Module) -> list[str]:
        """What a model answers to each question; the empty text for none.

        Raises:
            InputError: a logit is not finite, or ids are outside the vocabulary.
        """
        found = [_Found() for _ in self.data.questions]
        rows = [window.row for window in self.windows]
        with inference(model) as device:
            for places, batch in heads.batches(
                model, self.tokenizer, rows, self.evaluation.batch_size
            ):
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                out = model(**inputs)
                logits = torch.stack([out.start_logits, out.end_logits], 1).float().cpu()
                for place, pair in zip(places, logits, strict=True):
                    window = self.windows[place]
                    self._judge(window, pair, found[window.owner])
        return [
            self._answer(question, one)
            for question, one in zip(self.data.questions, found, strict=True)
        ]

    def _judge(self, window: Window, logits: Tensor, found: _Found) -> None:
        """One window's say; `logits` are (2, padded length)."""
        length = len(window.row["input_ids"])
        padded = logits.shape[1] - length
        begin = padded if self.tokenizer.padding_side == "left" else 0
        own = logits[:, begin : begin + length].numpy()
        question = self.data.questions[window.owner]
        if not np.isfinite(own).all():
            raise InputError(
                f"{question.where}: a logit is not finite; the model's weights or its dtype are "
                "broken: try --dtype float32"
            )
        found.null = min(found.null, float(own[0, window.null] + own[1, window.null]))
        score, span = best_span(own[0], own[1], window.spans)
        if span is not None and score > found.score:
            found.score, found.span = score, span

    def _answer(self, question: Question, found: _Found) -> str:
        if found.span is None:
            return ""
        nothing = found.null - found.score > self.evaluation.null_threshold
        if self.data.version == 2 and nothing:
            return ""
        return question.context[found.span[0] : found.span[1]]


def best_span(
    starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int] | None]
) -> tuple[float, tuple[int, int] | None]:
    """The best answer of a window: its score, and its characters in the context; None where there
    is no pair. `starts` and `ends` are (tokens,)."""
    firsts = np.argsort(-starts, kind="stable")[:N_BEST]
    lasts = np.argsort(-ends, kind="stable")[:N_BEST]
    inside = np.array([span is not None for span in spans])
    lengths = lasts[None, :] - firsts[:, None] + 1
    valid = inside[firsts][:, None] & inside[lasts][None, :] & (lengths >= 1) & (lengths <= LONGEST)
    if not valid.any():
        return -np.inf, None
    totals = np.where(valid, starts[firsts][:, None] + ends[lasts][None, :], -np.inf)
    row, column = np.unravel_index(int(totals.argmax()), totals.shape)
    first, last = spans[firsts[row]], spans[lasts[column]]
    assert first is not None
    assert last is not None
    return float(totals[row, column]), (first[0], last[1])


def windows_of(
    questions: Sequence[Question], tokenizer: Any, seq_len: int, stride: int
) -> Iterator[Window]:
    """Each question with parts of its context, `seq_len` tokens at most, `stride` of them shared.

    Raises:
        InputError: the tokenizer has no offsets, or a question leaves no room for its context.
    """
    if not tokenizer.is_fast:
        raise InputError("SQuAD needs the offsets of tokens; give a model with a tokenizer.json")
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    for begin in range(0, len(questions), _QUESTIONS):
        part = questions[begin : begin + _QUESTIONS]
        # white space in front of some questions would be tokens of some tokenizers
        asked = [question.text.strip() for question in part]
        alone = tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"]
        for question, ids in zip(part, alone, strict=True):
            room = seq_len - specials - len(ids)
            if room <= stride:
                raise InputError(
                    f"{question.where}: its {len(ids)} tokens leave {max(room, 0)} of a window of "
                    f"{seq_len} for the context, of which {stride} overlap; raise --seq-len"
                )
        found = tokenizer(
            asked,
            [question.context for question in part],
            truncation="only_second",
            max_length=seq_len,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        names = heads.inputs_in(found)
        for place, owner in enumerate(found["overflow_to_sample_mapping"]):
            row = {name: found[name][place] for name in names}
            ids = row["input_ids"]
            null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            sides, offsets = found.sequence_ids(place), found["offset_mapping"][place]
            spans = tuple(
                (span[0], span[1]) if side == 1 else None
                for side, span in zip(sides, offsets, strict=True)
            )
            yield Window(begin + owner, row, spans, null)

"""The evaluations of `task.METRICS`, prepared: tokens are made once, for any number of models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from liar_ext.evaluation import agreement, estimate, lm_harness, perplexity
from liar_ext.evaluation.choice_scores import result_of, score
from liar_ext.evaluation.choice_tokens import encode
from liar_ext.evaluation.choices import ChoiceSet, read_choices
from liar_ext.evaluation.glue import GlueMeasure, read_glue
from liar_ext.evaluation.measured import Dense, Measure, Measured, Readable
from liar_ext.evaluation.pairs import PairsMeasure, read_pairs
from liar_ext.evaluation.squad import SquadMeasure
from liar_ext.evaluation.squad_sets import read_squad
from liar_ext.evaluation.stsb import StsbSet, correlation, read_stsb
from liar_ext.evaluation.task import Evaluation
from liar_ext.evaluation.texts import Text, read_text, tokens_of


class TextMeasure:
    """Perplexity of a decoder."""

    def __init__(self, evaluation: Evaluation, tokenizer: Any, text: Text) -> None:
        assert evaluation.length is not None, "the metric has one of its own"
        self.length, self.batch_size = evaluation.length, evaluation.batch_size
        ids = tokens_of(text, tokenizer, self.length)
        self.ids = ids if evaluation.windows is None else ids[: evaluation.windows * self.length]
        self.facts = {
            "dataset": evaluation.path,
            "sha256": text.sha256,
            "protocol": {
                **text.describe(ids, tokenizer),
                "seq_len": self.length,
                "seq_len_from": evaluation.length_from,
            },
        }

    @property
    def key(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes() + b"%d" % self.length).hexdigest()

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        start = time.perf_counter()
        losses = perplexity.window_losses(model, self.ids, self.length, self.batch_size)
        seconds = time.perf_counter() - start
        return Measured(
            {"perplexity": estimate.perplexity(losses.numpy())},
            "windows",
            self._details(losses, seconds),
        )

    def _details(self, losses: Tensor, seconds: float) -> dict[str, Any]:
        found = perplexity.result_of(losses, self.length, seconds).to_json()
        found["loss_standard_error"] = found.pop("standard_error")
        return {**found, **self.facts}


class DivergenceMeasure(TextMeasure):
    """How far a decoder is from the dense one."""

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        assert dense is not None, "a divergence is from another model"
        reference = agreement.live(dense) if isinstance(dense, nn.Module) else dense
        found = agreement.agreement(model, reference, self.ids, self.length, self.batch_size)
        return Measured(
            {
                "kl": estimate.mean(found.divergence.numpy(), "windows", low=0.0),
                "top1_agreement": estimate.mean(found.top1.numpy(), "windows", low=0, high=100),
                "perplexity": estimate.perplexity(found.loss.numpy()),
            },
            "windows",
            self._details(found.loss, found.seconds),
            {"perplexity": estimate.perplexity(found.reference_loss.numpy())},
        )

    def record(self, dense: nn.Module, folder: Path) -> agreement.Reference:
        """See `agreement.recorded`."""
        return agreement.recorded(dense, self.ids, self.length, self.batch_size, folder)


class StsbMeasure:
    """Spearman × 100 of an encoder's sentence embeddings."""

    def __init__(self, evaluation: Evaluation, tokenizer: Any, data: StsbSet) -> None:
        assert evaluation.length is not None, "the metric has one of its own"
        self.evaluation, self.tokenizer, self.data = evaluation, tokenizer, data
        self.length = min(evaluation.length, 256)
        self.key = data.sha256

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        found, result = correlation(
            model,
            self.tokenizer,
            self.data,
            batch_size=self.evaluation.batch_size,
            max_length=self.length,
        )
        details = result.to_json()
        del details["standard_error"]
        facts = {"dataset": self.evaluation.path, "seq_len": self.length}
        return Measured({"spearman": found}, "pairs", {**facts, **details})


class ChoicesMeasure:
    """Accuracies of a decoder on multiple-choice questions."""

    def __init__(self, evaluation: Evaluation, tokenizer: Any, data: ChoiceSet) -> None:
        self.evaluation = evaluation
        self.encoded = encode(data, tokenizer, evaluation.length)
        self.key = self.encoded.choices.sha256

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        scores = score(model, self.encoded, self.evaluation.batch_size)
        details = result_of(self.encoded, scores).to_json()
        del details["standard_error"]
        correct = {name: estimate.share(each.numpy()) for name, each in scores.correct().items()}
        return Measured(correct, "questions", {"dataset": self.evaluation.path, **details})


# what is read of a source, once for all models, is also what is looked for in a calibration
READ: dict[str, Callable[[Evaluation], Readable]] = {
    "text": lambda evaluation: read_text(evaluation.path),
    "kl": lambda evaluation: read_text(evaluation.path),
    "stsb": lambda evaluation: read_stsb(evaluation.path),
    "choices": lambda evaluation: read_choices(evaluation.path),
    "lm-eval": lm_harness.read_tasks,
    "glue": lambda evaluation: read_glue(evaluation.path),
    "squad": lambda evaluation: read_squad(evaluation.path),
    "pairs": lambda evaluation: read_pairs(evaluation.path),
}

PREPARE: dict[str, Callable[[Evaluation, Any, Any], Measure]] = {
    "text": TextMeasure,
    "kl": DivergenceMeasure,
    "stsb": StsbMeasure,
    "choices": ChoicesMeasure,
    "lm-eval": lm_harness.HarnessMeasure,
    "glue": GlueMeasure,
    "squad": SquadMeasure,
    "pairs": PairsMeasure,
}

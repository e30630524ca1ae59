"""Evaluation: one metric on one file, for any number of models. `liar eval` and `liar compare`.

A further metric is one entry of `METRICS` and the function that it names. Importing this imports
neither torch nor transformers: the command line builds its options from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from liar_ext.calibration.sources import Corpus

    Measure = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """One kind of evaluation.

    Attributes:
        name: of the value; higher: whether that is better.
        decoder: of which models.
        file: what is given, as a usage line has it; help: what is measured.
        prepare: Evaluation, tokenizer -> a function on models.
        corpus: the texts of a file, to be held against those of a calibration.
        seq_len: tokens of an input where none are asked for; None is what the model takes.
        data_sets: whether the name of a data set will do for a file.
    """

    name: str
    higher: bool
    decoder: bool
    file: str
    help: str
    prepare: Callable[[Evaluation, Any], Measure]
    corpus: Callable[[str], Corpus]
    seq_len: int | None = 2048
    data_sets: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on what.

    Attributes:
        kind: a key of `METRICS`: `text` (perplexity of a decoder), `stsb` (Spearman × 100 of an
            encoder), `choices` (accuracy of a decoder on multiple-choice questions, in percent).
        path: the file.
        seq_len: tokens in a window, or of a sentence, or of a question with an answer, at most;
            None is the metric's own.
        batch_size: sequences in a forward.
        windows: perplexity of the first so many windows; None for all.
    """

    kind: str
    path: str
    seq_len: int | None = None
    batch_size: int = 8
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise InputError(f"evaluation {self.kind!r}: choose from {', '.join(METRICS)}")

    @property
    def name(self) -> str:
        return f"{self.kind}={self.path}"

    @property
    def metric(self) -> Metric:
        return METRICS[self.kind]

    @property
    def length(self) -> int | None:
        """`seq_len`, or else the metric's."""
        return self.metric.seq_len if self.seq_len is None else self.seq_len

    def fitted(self, limit: int | None) -> Evaluation:
        """With inputs that a model of so many positions takes."""
        lengths = [length for length in (self.length, limit) if length is not None]
        return replace(self, seq_len=min(lengths, default=None))

    def identity(self) -> dict[str, Any]:
        """All that its figures depend on beside the model, as JSON data.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        sizes = {"seq_len": self.length, "batch_size": self.batch_size, "windows": self.windows}
        return {"sha256": found, **sizes}

    def corpus(self) -> Corpus:
        """The texts. Raises InputError where there are none to be read."""
        return self.metric.corpus(self.path)

    def on(self, tokenizer: Any) -> Measure:
        """A function that measures models: `metric`, `value`, `standard_error`, `dataset`, and the
        fields of `PerplexityResult`, `StsbResult` or `ChoicesResult`. Tokens are made once.

        Raises:
            InputError: the file cannot be read. The function raises it where a model, or the
                file's contents, cannot be evaluated.
        """
        return self.metric.prepare(self, tokenizer)


def known(*, decoder: bool | None = None, form: str = "--{kind}") -> str:
    """The kinds there are for decoders, for encoders, or for both, as a message names them.

    Args:
        form: of one, with fields `kind` and `file`.
    """
    names = [
        form.format(kind=kind, file=metric.file)
        for kind, metric in METRICS.items()
        if decoder in (None, metric.decoder)
    ]
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _perplexity(evaluation: Evaluation, tokenizer: Any) -> Measure:
    from liar_ext.evaluation.perplexity import perplexity, tokenize

    length = evaluation.length
    assert length is not None, "the metric has one of its own"
    ids = tokenize(_read_text(Path(evaluation.path)), tokenizer)
    if evaluation.windows is not None:
        ids = ids[: evaluation.windows * length]

    def measure(model: nn.Module) -> dict[str, Any]:
        result = perplexity(model, ids, length, batch_size=evaluation.batch_size).to_json()
        # the loss is the mean of the windows; its error carries to the perplexity as a factor
        error = result["standard_error"]
        return {
            "metric": evaluation.metric.name,
            "value": result["perplexity"],
            "dataset": evaluation.path,
            **result,
            "standard_error": None if error is None else error * result["perplexity"],
            "loss_standard_error": error,
        }

    return measure


def _spearman(evaluation: Evaluation, tokenizer: Any) -> Measure:
    from liar_ext.evaluation.stsb import spearman

    length = evaluation.length
    assert length is not None, "the metric has one of its own"

    def measure(model: nn.Module) -> dict[str, Any]:
        result = spearman(
            model,
            tokenizer,
            evaluation.path,
            batch_size=evaluation.batch_size,
            max_length=min(length, 256),
        ).to_json()
        metric = {"metric": evaluation.metric.name, "value": result["spearman"]}
        return {**metric, "dataset": evaluation.path, **result}

    return measure


def _accuracy(evaluation: Evaluation, tokenizer: Any) -> Measure:
    from liar_ext.evaluation.choice_scores import result_of, score
    from liar_ext.evaluation.choice_tokens import encode
    from liar_ext.evaluation.choices import read_choices

    encoded = encode(read_choices(evaluation.path), tokenizer, evaluation.length)

    def measure(model: nn.Module) -> dict[str, Any]:
        result = result_of(encoded, score(model, encoded, evaluation.batch_size)).to_json()
        metric = {"metric": evaluation.metric.name, "value": result["accuracy"]}
        return {**metric, "dataset": evaluation.path, **result}

    return measure


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _text_corpus(path: str) -> Corpus:
    from liar_ext.calibration.sources import read

    return read(path)


def _choices_corpus(path: str) -> Corpus:
    from liar_ext.evaluation.choices import read_choices

    return read_choices(path).corpus()


METRICS = {
    "text": Metric(
        name="perplexity",
        higher=False,
        decoder=True,
        file="FILE",
        help="perplexity on this text (decoders)",
        prepare=_perplexity,
        corpus=_text_corpus,
    ),
    "stsb": Metric(
        name="spearman",
        higher=True,
        decoder=False,
        file="FILE.csv",
        help="Spearman x 100 (encoders)",
        prepare=_spearman,
        corpus=_text_corpus,
    ),
    "choices": Metric(
        name="accuracy",
        higher=True,
        decoder=True,
        file="FILE.jsonl",
        help="accuracy on multiple-choice questions, percent (decoders)",
        prepare=_accuracy,
        corpus=_choices_corpus,
        seq_len=None,
        data_sets=True,
    ),
}

"""Evaluation: one metric on one source, for any number of models. `liar eval` and `liar compare`.

A further metric is one entry of `METRICS`, and one each of `measures.READ` and `PREPARE`.
Importing this imports neither torch nor transformers: the command line builds its options from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError
from liar_ext.evaluation.glue_names import TASKS, glue_source
from liar_ext.evaluation.text_names import protocol_of

if TYPE_CHECKING:
    from liar_ext.calibration.sources import Corpus
    from liar_ext.evaluation.limits import Limits
    from liar_ext.evaluation.measured import Measure, Readable

DECODER, ENCODER, ENCODER_DECODER = "decoder", "encoder", "encoder-decoder"
# heads of encoders, as transformers names its classes
CLASSIFIER, READER = "ForSequenceClassification", "ForQuestionAnswering"


@dataclass(frozen=True)
class Metric:
    """One kind of evaluation.

    Attributes:
        name: of the value; higher: whether that is better.
        model: what is evaluated, `DECODER`, `ENCODER` or `ENCODER_DECODER`; head: and with which,
            or any.
        form: what is given, as a usage line has it; help: what is measured.
        option: of `liar eval`; None where another option's source is meant.
        source: what is given -> the file or data set in it.
        seq_len: tokens of an input where none are asked for; None is what the model takes.
    """

    name: str
    higher: bool
    model: str
    form: str
    help: str
    option: str | None
    head: str | None = None
    source: Callable[[str], str] = str
    seq_len: int | None = 2048


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on what.

    Attributes:
        kind: a key of `METRICS`: `text` (perplexity of a decoder), `kl` (its divergence from the
            dense one), `stsb` (Spearman × 100 of an encoder), `choices` (accuracy of a decoder on
            multiple-choice questions, in percent), `lm-eval` (tasks of the harness, of a decoder),
            `glue` (its metrics, of an encoder with a classification head), `squad` (F1 of one
            with a question-answering head), `pairs` (perplexity of targets given their sources, of
            an encoder-decoder).
        path: the source, in the metric's form.
        seq_len: tokens in a window, or of a sentence, or of a question with an answer, at most;
            None is the metric's own.
        batch_size: sequences in a forward.
        windows: of a text the first so many windows; None for all.
        length_from: where `length` is from, for people.
        shots, limit, include_path: of `lm-eval`: examples in front of a question, documents of
            a task at most, and a folder of further tasks.
        null_threshold: of `squad`: "no answer" has to be better than the best span by more.
    """

    kind: str
    path: str
    seq_len: int | None = None
    batch_size: int = 8
    windows: int | None = None
    length_from: str = ""
    shots: int | None = None
    limit: int | None = None
    include_path: str | None = None
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise InputError(f"evaluation {self.kind!r}: choose from {', '.join(METRICS)}")
        self.metric.source(self.path)  # refuses a form that it has not
        if not self.length_from:
            where = "the default" if self.seq_len is None else "as asked for"
            object.__setattr__(self, "length_from", where)

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
        if limit is None or (self.length is not None and self.length <= limit):
            return replace(self, seq_len=self.length)
        return replace(self, seq_len=limit, length_from="the model's limit")

    def check(self, folder: Path, limits: Limits, form: str) -> None:
        """Before any weight is read: raises InputError where a model is not evaluated so.

        Args:
            form: of other kinds in the message, see `known`.
        """
        if self.metric.model != limits.kind:
            raise InputError(
                f"{folder}: a {limits.model_type} model is evaluated with "
                f"{known(model=limits.kind, form=form)}"
            )
        if self.metric.head not in (None, limits.head):
            raise InputError(
                f"{folder}: {limits.architecture} has not the head that {self.kind} is about; give "
                f"a fine-tuned model, of a class ...{self.metric.head}"
            )

    def identity(self) -> dict[str, Any]:
        """All that its figures depend on beside the model, as JSON data.

        Raises:
            InputError: the source cannot be read.
        """
        sizes: dict[str, Any] = {"seq_len": self.length, "batch_size": self.batch_size}
        if self.kind == "lm-eval":
            from liar_ext.evaluation.lm_harness import digest

            asked = {"shots": self.shots, "limit": self.limit}
            return {"sha256": digest(self), **sizes, **asked}
        source = self.metric.source(self.path)
        path = Path(source).expanduser()
        try:
            if path.is_dir() or not path.exists():
                found = self.corpus().sha256
            else:
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from error
        return {
            "sha256": found,
            **sizes,
            "windows": self.windows,
            **({"null_threshold": self.null_threshold} if self.kind == "squad" else {}),
        }

    def read(self) -> Readable:
        """The source. Raises InputError where it cannot be read."""
        from liar_ext.evaluation.measures import READ

        return READ[self.kind](self)

    def corpus(self) -> Corpus:
        """The texts. Raises InputError where there are none to be read."""
        return self.read().corpus()

    def on(self, tokenizer: Any, source: Readable | None = None) -> Measure:
        """A function that measures models. Tokens are made once.

        Args:
            source: what `read` gave, for several tokenizers; None reads it here.
        Raises:
            InputError: the source cannot be read. The function raises it where a model, or what
                was read, cannot be evaluated.
        """
        from liar_ext.evaluation.measures import PREPARE

        return PREPARE[self.kind](self, tokenizer, self.read() if source is None else source)


def known(*, model: str | None = None, form: str = "{option}") -> str:
    """The kinds there are for decoders, for encoders, or for both, as a message names them.

    Args:
        form: of one, with fields `kind`, `option` and `form`; kinds without an option of their own
            are left out where `option` is a field.
    """
    names = [
        form.format(kind=kind, option=metric.option, form=metric.form)
        for kind, metric in METRICS.items()
        if model in (None, metric.model) and (metric.option or "{option}" not in form)
    ]
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _text_source(path: str) -> str:
    return protocol_of(path)[1]


METRICS = {
    "text": Metric(
        name="perplexity",
        higher=False,
        model=DECODER,
        form="FILE",
        help="perplexity on this text (decoders): FILE, or PROTOCOL=FILE with wikitext2, ptb, c4, "
        "whose pieces are joined as the field does it",
        option="--text",
        source=_text_source,
    ),
    "kl": Metric(
        name="kl",
        higher=False,
        model=DECODER,
        form="FILE",
        help="divergence from the dense model's next-token distributions on this text, nats a "
        "token (decoders)",
        option=None,
        source=_text_source,
    ),
    "stsb": Metric(
        name="spearman",
        higher=True,
        model=ENCODER,
        form="FILE.csv",
        help="Spearman x 100 (encoders)",
        option="--stsb",
    ),
    "choices": Metric(
        name="accuracy",
        higher=True,
        model=DECODER,
        form="FILE.jsonl",
        help="accuracy on multiple-choice questions, percent (decoders)",
        option="--choices",
        seq_len=None,
    ),
    "glue": Metric(
        name="glue",
        higher=True,
        model=ENCODER,
        form="TASK=FILE",
        help="a task of GLUE (encoders with a classification head): "
        + ", ".join(TASKS)
        + "; FILE is its .tsv, or .jsonl, .parquet with the hub's fields",
        option="--glue",
        head=CLASSIFIER,
        source=glue_source,
        seq_len=128,
    ),
    "squad": Metric(
        name="f1",
        higher=True,
        model=ENCODER,
        form="FILE.json",
        help="F1 and exact match on SQuAD, version 1.1 or 2.0 (encoders with a question-answering "
        "head)",
        option="--squad",
        head=READER,
        seq_len=384,
    ),
    "pairs": Metric(
        name="perplexity",
        higher=False,
        model=ENCODER_DECODER,
        form="FILE.jsonl",
        help="perplexity of targets given their sources, lines of {source, target} "
        "(encoder-decoders)",
        option="--pairs",
        seq_len=512,
    ),
    "lm-eval": Metric(
        name="lm-eval",
        higher=True,
        model=DECODER,
        form="TASK,TASK",
        help="tasks, groups or tags of EleutherAI's lm-evaluation-harness, which has to be "
        "installed (decoders)",
        option="--lm-eval",
        seq_len=None,
    ),
}
# kinds of which the first windows can be asked for
WINDOWED = ("text", "kl")

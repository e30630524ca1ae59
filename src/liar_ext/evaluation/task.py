"""Evaluation: one metric on one file, for any number of models. `liar eval` and `liar compare`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from liar_ext.errors import InputError


@dataclass(frozen=True)
class Metric:
    """Attributes: `name` of the value; `decoder`: of which models; whether `higher` is better."""

    name: str
    decoder: bool
    higher: bool


METRICS = {"text": Metric("perplexity", True, False), "stsb": Metric("spearman", False, True)}


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on what.

    Attributes:
        kind: `text` (perplexity of a decoder) or `stsb` (Spearman × 100 of an encoder).
        path: the file.
        seq_len: tokens in a window, or of a sentence at most.
        batch_size: windows or sentences in a forward.
        windows: perplexity of the first so many windows; None for all.
    """

    kind: str
    path: str
    seq_len: int = 2048
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
        sizes = {"seq_len": self.seq_len, "batch_size": self.batch_size, "windows": self.windows}
        return {"sha256": found, **sizes}

    def on(self, tokenizer: Any) -> Callable[[nn.Module], dict[str, Any]]:
        """A function that measures models: `metric`, `value`, `standard_error`, `dataset`, and the
        fields of `PerplexityResult` or `StsbResult`. Tokens are made once.

        Raises:
            InputError: the file cannot be read. The function raises it where a model, or the
                file's contents, cannot be evaluated.
        """
        return self._perplexity(tokenizer) if self.kind == "text" else self._spearman(tokenizer)

    def _perplexity(self, tokenizer: Any) -> Callable[[nn.Module], dict[str, Any]]:
        from liar_ext.evaluation.perplexity import perplexity, tokenize

        ids = tokenize(_read_text(Path(self.path)), tokenizer)
        if self.windows is not None:
            ids = ids[: self.windows * self.seq_len]

        def measure(model: nn.Module) -> dict[str, Any]:
            result = perplexity(model, ids, self.seq_len, batch_size=self.batch_size).to_json()
            # the loss is the mean of the windows; its error carries to the perplexity as a factor
            error = result["standard_error"]
            return {
                "metric": self.metric.name,
                "value": result["perplexity"],
                "dataset": self.path,
                **result,
                "standard_error": None if error is None else error * result["perplexity"],
                "loss_standard_error": error,
            }

        return measure

    def _spearman(self, tokenizer: Any) -> Callable[[nn.Module], dict[str, Any]]:
        from liar_ext.evaluation.stsb import spearman

        def measure(model: nn.Module) -> dict[str, Any]:
            length = min(self.seq_len, 256)
            result = spearman(
                model, tokenizer, self.path, batch_size=self.batch_size, max_length=length
            ).to_json()
            metric = {"metric": self.metric.name, "value": result["spearman"]}
            return {**metric, "dataset": self.path, **result}

        return measure


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error

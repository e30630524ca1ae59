"""The tasks of GLUE: their files, fields, labels and metrics. Importing this imports no library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from liar_ext.errors import InputError

_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as it is given.
        fields: of the hub's records that are the texts: one, or two of a pair.
        columns: of the distributed `.tsv` that are the same.
        label: its column there; `names`: of the labels in GLUE's order, empty for a score.
        metrics: of GLUE; the first is the one that an evaluation is about.
        header: whether the `.tsv` has one; without, columns are numbers from 0.
        config, split: of the hub's data set.
    """

    name: str
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    header: bool = True
    config: str = ""
    split: str = "validation"

    @property
    def hub(self) -> str:
        return f"{_HUB}:{self.config or self.name}:{self.split}"


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_MNLI = {
    "fields": ("premise", "hypothesis"),
    "columns": _PAIR,
    "label": "gold_label",
    "names": _INFERENCE,
}

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            ("sentence",),
            ("3",),
            "1",
            ("unacceptable", "acceptable"),
            ("matthews",),
            header=False,
        ),
        Task("sst2", ("sentence",), ("sentence",), "label", ("negative", "positive")),
        Task(
            "mrpc",
            _PAIR,
            ("#1 String", "#2 String"),
            "Quality",
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
        ),
        Task("stsb", _PAIR, _PAIR, "score", (), ("spearman", "pearson")),
        Task(
            "qqp",
            ("question1", "question2"),
            ("question1", "question2"),
            "is_duplicate",
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
        ),
        Task("mnli", **_MNLI, split="validation_matched"),  # type: ignore[arg-type]
        Task("mnli-mm", **_MNLI, config="mnli", split="validation_mismatched"),  # type: ignore[arg-type]
        Task("qnli", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILED),
        Task("rte", _PAIR, _PAIR, "label", _ENTAILED),
        Task("wnli", _PAIR, _PAIR, "label", ("not_entailment", "entailment")),
    )
}


def task_of(spec: str) -> tuple[Task, str]:
    """The task and the source of `TASK=FILE`, or `TASK`, whose source is the hub's data set.

    Raises:
        InputError: there is no such task, or no source behind the "=".
    """
    name, equals, source = spec.partition("=")
    task = TASKS.get(name)
    if task is None:
        hint = f"; give TASK={spec}" if Path(spec).expanduser().exists() else ""
        raise InputError(f"{spec}: {name!r} is no task of GLUE ({', '.join(TASKS)}){hint}")
    if equals and not source:
        raise InputError(f"{spec}: names no source; give {name}=FILE")
    return task, source or task.hub


def glue_source(spec: str) -> str:
    """The file or data set of a spec."""
    return task_of(spec)[1]

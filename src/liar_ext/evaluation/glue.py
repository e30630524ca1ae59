"""GLUE: sentences and pairs that an encoder with a head classifies or scores.

Labels are matched by name. A config whose `label2id` names the task's labels says in which order
its logits are; one with the names that transformers gives where nobody named anything (`LABEL_0`)
is taken to have GLUE's own order, as a head trained on the hub's integers has. What fits neither is
refused.

Source of formats, labels and metrics: Wang et al., GLUE (arXiv 1804.07461), its distributed files
and the data set `nyu-mll/glue`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from liar_ext.calibration.records import json_records
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError
from liar_ext.evaluation import heads
from liar_ext.evaluation.glue_metrics import ESTIMATES
from liar_ext.evaluation.glue_names import Task, task_of
from liar_ext.evaluation.measured import Dense, Measured
from liar_ext.evaluation.records import Records, open_records
from liar_ext.evaluation.task import Evaluation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TABLES = (".tsv", ".txt")
_UNLABELLED = "; test splits have no labels: use the validation split (dev.tsv)"
_UNNAMED = re.compile(r"label[ _-]?(\d+)|(\d+)")


@dataclass(frozen=True, eq=False)
class GlueSet:
    """The examples of one source.

    Attributes:
        name: as the user gave it.
        texts: of each example, one or two.
        labels: (n,) int64 places in the task's names, or float64 scores.
        sha256: hex digest of the file's bytes; of a data set, of the texts and labels.
    """

    name: str
    task: Task
    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray
    sha256: str

    def corpus(self) -> Corpus:
        """The texts, for `calibration.overlap`."""
        documents = tuple(text for texts in self.texts for text in texts)
        return Corpus(self.name, "jsonl", self.sha256, documents)


def read_glue(spec: str) -> GlueSet:
    """Read a set.

    Args:
        spec: `TASK=FILE` with a `.tsv` as GLUE distributes it (`.txt` for MRPC), a `.jsonl` or
            `.parquet` with the hub's fields; `TASK=NAME[:CONFIG][:SPLIT]`, a data set; `TASK`, the
            hub's.
    Raises:
        InputError: an unknown task; a source that is missing, cut off, empty or without labels, or
            has other columns.
    """
    task, source = task_of(spec)
    readers = {suffix: partial(_rows, task) for suffix in _TABLES} | {".jsonl": json_records}
    records, digest = open_records(source, readers, task.split, "the .tsv file")
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for where, record in records:
        own, label = _example(where, record, task)
        texts.append(own)
        labels.append(label)
    if not texts:
        raise InputError(f"{source}: no examples; give a file of {task.name}")
    kind = np.int64 if task.names else np.float64
    return GlueSet(spec, task, tuple(texts), np.array(labels, dtype=kind), digest())


class GlueMeasure:
    """The task's metrics, × 100."""

    def __init__(self, evaluation: Evaluation, tokenizer: Any, data: GlueSet | None = None) -> None:
        assert evaluation.length is not None, "the metric has one of its own"
        self.data = read_glue(evaluation.path) if data is None else data
        self.batch_size, self.tokenizer = evaluation.batch_size, tokenizer
        self.rows = heads.encode(tokenizer, self.data.texts, evaluation.length)
        self.facts: dict[str, Any] = {
            "dataset": evaluation.path,
            "sha256": self.data.sha256,
            "task": self.data.task.name,
            "seq_len": evaluation.length,
        }
        self.key = self.data.sha256

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        task, start = self.data.task, time.perf_counter()
        config: Any = model.config
        order = label_order(task, config)
        logits = heads.logits_of(model, self.tokenizer, self.rows.ids, self.batch_size)
        _check(logits, self.data)
        guessed: np.ndarray
        if order is None:
            guessed = logits[:, 0].numpy()
        else:
            guessed = logits[:, order].argmax(1).numpy()
        found = {name: ESTIMATES[name](self.data.labels, guessed) for name in task.metrics}
        details = {
            **self.facts,
            "examples": len(self.data.texts),
            "truncated": self.rows.truncated,
            "label_order": None if order is None else [task.names[i] for i in np.argsort(order)],
            "label_order_from": None if order is None else label_order_from(config),
            "seconds": time.perf_counter() - start,
        }
        return Measured(found, "examples", details)


def label_order(task: Task, config: PretrainedConfig) -> list[int] | None:
    """For each of the task's labels the logit that is its; None for a score.

    Raises:
        InputError: another number of labels, or names that are not the task's.
    """
    count = config.num_labels
    wanted = max(1, len(task.names))
    if count != wanted:
        what = f"{wanted} labels ({', '.join(task.names)})" if task.names else "one, a score"
        raise InputError(f"the model's head has {count} labels and {task.name} has {what}")
    if not task.names:
        return None
    named = _named(config)
    if named is None:
        return list(range(count))
    places = {_plain(name): place for name, place in named.items()}
    missing = [name for name in task.names if _plain(name) not in places]
    if missing or sorted(places.values()) != list(range(count)):
        raise InputError(
            f"the model's labels are {', '.join(map(str, named))} and those of {task.name} "
            f"{', '.join(task.names)}; set label2id in config.json to these"
        )
    return [places[_plain(name)] for name in task.names]


def label_order_from(config: PretrainedConfig) -> str:
    """`config` where it names its labels; else `assumed` to be the task's: published heads of MNLI
    with LABEL_0 to LABEL_2 are not all in GLUE's order."""
    return "assumed" if _named(config) is None else "config"


def _named(config: PretrainedConfig) -> dict[str, int] | None:
    """The config's own names of the labels, None where it has none.

    Raises:
        InputError: `label2id` and `id2label` contradict one another.
    """
    by_name = {str(name): int(place) for name, place in (config.label2id or {}).items()}
    by_place = {str(name): int(place) for place, name in (config.id2label or {}).items()}
    found = [one for one in (by_name, by_place) if one and not _unnamed(one)]
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(
            f"config.json: label2id says {found[0]} and id2label {found[1]}; make them agree"
        )
    return found[0] if found else None


def _unnamed(labels: Mapping[str, int]) -> bool:
    """Whether names are numbers, each its own place."""
    for name, place in labels.items():
        match = _UNNAMED.fullmatch(name.lower())
        if match is None or int(match[1] or match[2]) != place:
            return False
    return True


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _check(logits: Tensor, data: GlueSet) -> None:
    bad = (~torch.isfinite(logits)).any(1).nonzero().flatten()
    if bad.numel():
        raise InputError(
            f"{data.name}: the logits of example {int(bad[0]) + 1} are not finite; the model's "
            "weights or its dtype are broken: try --dtype float32"
        )


def _rows(task: Task, source: str, text: str) -> Records:
    """The rows of a distributed file, in the hub's fields. Quotes there mean nothing."""
    # str.splitlines also cuts at U+2028 and others, which sentences have
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[0].strip():
        raise InputError(f"{source}: the file is empty or begins with a blank line")
    first = lines[0].split("\t")
    names = first if task.header else [str(place) for place in range(len(first))]
    missing = [name for name in (*task.columns, task.label) if name not in names]
    if missing:
        unlabelled = missing == [task.label]
        raise InputError(
            f"{source}: no column {missing[0]!r} (found {', '.join(names)[:100]}); give the .tsv "
            f"of {task.name} as GLUE distributes it{_UNLABELLED if unlabelled else ''}"
        )
    places = {
        field: names.index(column)
        for field, column in zip((*task.fields, "label"), (*task.columns, task.label), strict=True)
    }
    for number, line in enumerate(lines, 1):
        if (number == 1 and task.header) or not line.strip():
            continue
        row = line.split("\t")
        if len(row) <= max(places.values()):
            raise InputError(
                f"{source}: line {number}: {len(row)} columns of {len(names)}; the file is cut off "
                "or is not tab-separated"
            )
        yield f"{source}: line {number}", {field: row[place] for field, place in places.items()}


def _example(where: str, record: Any, task: Task) -> tuple[tuple[str, ...], float]:
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected an object, got {record!r:.40}")
    texts = []
    for field in (*task.fields, "label"):
        if field not in record:
            found = ", ".join(map(str, record)) or "none"
            raise InputError(
                f"{where}: no field {field!r} (found {found[:100]}); {task.name} has "
                f"{', '.join(task.fields)} and label"
            )
    for field in task.fields:
        if not isinstance(record[field], str):
            raise InputError(f"{where}: field {field!r} is {record[field]!r:.40}; give a text")
        texts.append(record[field])
    return tuple(texts), _label(where, record["label"], task)


def _label(where: str, value: Any, task: Task) -> float:
    text = value.strip() if isinstance(value, str) else value
    if not task.names:
        try:
            score = float(text)
        except (TypeError, ValueError):
            score = float("nan")
        if not np.isfinite(score) or score < 0:
            raise InputError(f"{where}: score {value!r:.40} is no number from 0{_UNLABELLED}")
        return score
    if isinstance(text, str):
        known = {_plain(name): place for place, name in enumerate(task.names)}
        if _plain(text) in known:
            return known[_plain(text)]
        text = int(text) if text.isascii() and text.isdigit() else None
    if isinstance(text, bool) or not isinstance(text, int) or not 0 <= text < len(task.names):
        raise InputError(
            f"{where}: label {value!r:.40} is none of {', '.join(task.names)}, nor a number from 0 "
            f"to {len(task.names) - 1}{_UNLABELLED}"
        )
    return text

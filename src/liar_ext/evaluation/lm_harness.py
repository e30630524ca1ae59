"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`) on a model that `liar_ext.load` loads.

The harness makes the prompts, asks the model and scores; here its figures become estimates: those
that are means of its samples with a unit for each document, so that two models' are paired, all
others with the harness's own standard error. Figures have the harness's scale (an accuracy is 0.5
and not 50).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from liar_ext.calibration.records import one_line
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError
from liar_ext.evaluation import estimate
from liar_ext.evaluation.choices import texts_of
from liar_ext.evaluation.estimate import Estimate
from liar_ext.evaluation.measured import Dense, Measured
from liar_ext.evaluation.mode import inference
from liar_ext.evaluation.task import Evaluation

# of metrics that are no means; the harness's own default is 100,000
_BOOTSTRAPS = 1000
# examples in front of a question are drawn with the harness's own seed
_SEED = 1234


@dataclass(frozen=True, eq=False)
class Tasks:
    """Attributes: `name`, as the user gave it; `loaded`, what the harness has made of it."""

    name: str
    loaded: dict[str, Any]

    def corpus(self) -> Corpus:
        """The texts of the documents, for `calibration.overlap`."""
        documents: list[str] = []
        for task in self.loaded["tasks"].values():
            for document in task.eval_docs:
                documents += texts_of(dict(document))
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        return Corpus(self.name, "jsonl", digest, tuple(documents))


class HarnessMeasure:
    """Figures of tasks, first the mean of the first metric of each where there are several.

    Raises:
        InputError: the package is missing, or a task is unknown or its data cannot be read.
    """

    def __init__(self, evaluation: Evaluation, tokenizer: Any, data: Tasks | None = None) -> None:
        self.evaluation, self.tokenizer = evaluation, tokenizer
        self._loaded = (read_tasks(evaluation) if data is None else data).loaded
        for task in self._loaded["tasks"].values():
            # a task whose config says 0 is never given examples, as in the harness
            own = task.get_config("num_fewshot")
            if evaluation.shots is not None and own != 0:
                task.set_config(key="num_fewshot", value=evaluation.shots)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        self.key = _digest(self._loaded, evaluation)

    def __call__(self, model: nn.Module, dense: Dense | None = None) -> Measured:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        start = time.perf_counter()
        with inference(model), _quiet():
            harness = HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,
                batch_size=self.evaluation.batch_size,
                max_length=self.evaluation.length,
            )
            found = lm_eval.evaluate(
                lm=harness,
                task_dict=self._loaded,
                limit=self.evaluation.limit,
                bootstrap_iters=_BOOTSTRAPS,
            )
        estimates = _estimates(found)
        if not estimates:
            raise InputError(f"--lm-eval {self.evaluation.path}: the tasks gave no figures")
        details = {
            "dataset": self.evaluation.path,
            "tasks": {
                name: {
                    "version": found["versions"].get(name),
                    "num_fewshot": found["n-shot"].get(name),
                    "samples": found["n-samples"][name]["effective"],
                }
                for name in self._loaded["tasks"]
            },
            "limit": self.evaluation.limit,
            "lm_eval": lm_eval.__version__,
            "seconds": time.perf_counter() - start,
        }
        return Measured(estimates, "documents", details)


def load_tasks(evaluation: Evaluation) -> dict[str, Any]:
    """Tasks, groups and tags by name, from `include_path` alone where all of them are there: the
    harness reads ten thousand files to find its own.

    Raises:
        InputError: as `HarnessMeasure`.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            "--lm-eval: needs the package 'lm-eval' (pip install 'liar-ext[lm-eval]')"
        ) from error
    names = evaluation.path.split(",")
    include = evaluation.include_path
    if not all(names):
        raise InputError(f"--lm-eval {evaluation.path}: a task has no name; give NAME,NAME")
    if include is not None and not Path(include).is_dir():
        raise InputError(f"--include-path {include}: no such folder")
    try:
        with _quiet():
            manager = TaskManager(include_path=include, include_defaults=False)
            if not set(names) <= set(manager.all_tasks):
                manager = TaskManager(include_path=include)
    except Exception as error:
        # whatever a YAML file makes of its parser
        raise InputError(f"--include-path {include}: {one_line(error)}") from error
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"--lm-eval {unknown[0]}: no such task, group or tag; `lm-eval ls tasks` lists them, "
            "and --include-path names a folder of your own"
        )
    try:
        with _quiet():
            return dict(manager.load(names))
    except Exception as error:
        # the package datasets raises many types for what cannot be read or reached
        raise InputError(
            f"--lm-eval {evaluation.path}: the tasks cannot be loaded ({one_line(error)})"
        ) from error


def _plain(value: Any) -> str:
    """What JSON has no form for, without its address in memory."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def digest(evaluation: Evaluation) -> str:
    """Of all that figures of these tasks depend on beside the model.

    Raises:
        InputError: as `load_tasks`.
    """
    return _digest(load_tasks(evaluation), evaluation)


def read_tasks(evaluation: Evaluation) -> Tasks:
    """The tasks that are asked for; raises InputError as `load_tasks`."""
    return Tasks(evaluation.path, load_tasks(evaluation))


def _digest(loaded: Mapping[str, Any], evaluation: Evaluation) -> str:
    """Of what is asked: documents, configs, examples in front, and the harness that asks."""
    asked = [version("lm_eval"), evaluation.shots, evaluation.limit]
    found = hashlib.sha256(json.dumps(asked).encode())
    for name, task in loaded["tasks"].items():
        found.update(name.encode())
        config = task.dump_config()
        # where a task is from says nothing of what it asks
        config = {key: value for key, value in config.items() if key != "metadata"}
        found.update(json.dumps(config, sort_keys=True, default=_plain).encode())
        for document in task.eval_docs:
            found.update(json.dumps(document, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _estimates(found: Mapping[str, Any]) -> dict[str, Estimate]:
    """By task (or group) and metric, as the harness names them; the mean of several tasks first."""
    results: dict[str, Estimate] = {}
    first: list[Estimate] = []
    samples = found.get("samples") or {}
    subtasks: Mapping[str, Sequence[str]] = found.get("group_subtasks") or {}
    inside = {task for tasks in subtasks.values() for task in tasks}
    for name, row in {**found["results"], **(found.get("groups") or {})}.items():
        own = {}
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{name} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            values = _values(name, metric, filtered, samples, subtasks)
            error = row.get(f"{metric}_stderr,{filtered}")
            own[label] = _one(float(value), values, error)
        results |= own
        if own and name not in inside:
            first.append(next(iter(own.values())))
    if len(first) > 1 and all(len(one.units) for one in first):
        return {f"mean of {len(first)} tasks": estimate.mean_of(first), **results}
    return results


def _values(
    name: str,
    metric: str,
    filtered: str,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    subtasks: Mapping[str, Sequence[str]],
) -> list[float]:
    """What a metric is of each document, of a group's tasks one after the other; none where that is
    no number."""
    found: list[float] = []
    tasks = [name] if name in samples else list(_leaves(name, subtasks))
    for task in tasks:
        for sample in samples.get(task, ()):
            if sample.get("filter", "none") != filtered:
                continue
            value = sample.get(metric)
            if not isinstance(value, int | float | np.number):
                return []
            found.append(float(value))
    return found


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for task in subtasks.get(name, ()):
        if task in subtasks:
            yield from _leaves(task, subtasks)
        else:
            yield task


def _one(value: float, values: Sequence[float], error: Any) -> Estimate:
    """A figure from its documents where it is their mean, else with the harness's own error."""
    if values and math.isclose(sum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12):
        if set(values) <= {0.0, 1.0}:
            return estimate.share(values, "documents", scale=1.0)
        return estimate.mean(values, "documents")
    known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
    return estimate.stated(value, known, "lm-eval's standard error")


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's notices would mix with ours, and standard output is for results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)

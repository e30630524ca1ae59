"""Evaluations of one folder, alone or beside the dense one, with one model in memory at a time."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from liar_ext.checkpoint.load import load, resolve
from liar_ext.engine.execution import HELD_SHARE, free_bytes
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.errors import InputError
from liar_ext.evaluation.estimate import Difference
from liar_ext.evaluation.limits import limits_of
from liar_ext.evaluation.measured import Dense, Measure, Measured, Readable, Recording
from liar_ext.evaluation.task import Evaluation


@dataclass(frozen=True, eq=False)
class Result:
    """One evaluation of a model, and of the dense one where there is one.

    Attributes:
        evaluation: as it was run. model, dense: what was measured.
        difference: model − dense, by metric; empty without a dense model.
        source: what was read for it, once.
    """

    evaluation: Evaluation
    model: Measured
    dense: Measured | None
    difference: dict[str, Difference]
    source: Readable

    def to_json(self, source: str | Path, dense: str | Path | None = None) -> dict[str, Any]:
        """JSON data: the model's own with `source`; `dense` the same of the dense one, and
        `difference` by metric.

        Args:
            source, dense: names of the two, as the user knows them.
        """
        kind = self.evaluation.kind
        found = {"source": str(source), "kind": kind, **self.model.to_json()}
        if self.dense is not None:
            found["dense"] = {"source": str(dense), "kind": kind, **self.dense.to_json()}
        elif self.model.reference:
            found["against"] = str(dense)
        if self.difference:
            found["difference"] = {name: one.to_json() for name, one in self.difference.items()}
        return found


def evaluate(
    folder: str | Path,
    evaluations: Sequence[Evaluation],
    *,
    dense: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    one_at_a_time: bool | None = None,
    scratch: Path | None = None,
) -> list[Result]:
    """Measure a model in every way that is asked for, and the dense one in the same ways.

    Each source is read once, and what is wrong with it is found before weights are. Inputs are as
    long as both models take. Differences are paired, unit by unit, where both were measured on the
    same tokens or questions.

    Args:
        folder, dense: folders or hub ids; evaluations: of one kind of model.
        device, dtype: as for `liar_ext.load`.
        one_at_a_time: of a divergence: only one of the two models is in memory, states of the
            dense one are on disk; None is where both do not fit.
        scratch: folder for them; None is the system's.
    Raises:
        InputError: a folder, or a source, cannot be used.
    """
    folders = [resolve(each) for each in (folder, dense) if each is not None]
    limits = [limits_of(each) for each in folders]
    for each, own in zip(folders, limits, strict=True):
        for evaluation in evaluations:
            evaluation.check(each, own, form="{option}")
    known = [own.positions for own in limits if own.positions is not None]
    fitted = [evaluation.fitted(min(known, default=None)) for evaluation in evaluations]
    sources = [evaluation.read() for evaluation in fitted]
    prepared = [_prepared(each, fitted, sources) for each in folders]
    kinds = {evaluation.kind for evaluation in evaluations}
    if "kl" in kinds:
        if dense is None or len(kinds) > 1:
            raise InputError(
                "kl: a divergence is from a dense model, which has to be given, and is measured "
                "apart from others"
            )
        return _against(
            folders[0], folders[1], fitted, sources, prepared, device, dtype, one_at_a_time, scratch
        )
    found: list[list[Measured]] = []
    # the dense one first, so that what is printed of a crash is of the one that matters
    for each, measures in reversed(list(zip(folders, prepared, strict=True))):
        model = load(each, dtype=dtype, device=device)
        found.insert(0, [measure(model) for measure in measures])
        del model
        forget()
    if dense is None:
        return [
            Result(evaluation, own, None, {}, source)
            for evaluation, own, source in zip(fitted, found[0], sources, strict=True)
        ]
    results = []
    for evaluation, source, own, other, *measures in zip(
        fitted, sources, *found, *prepared, strict=True
    ):
        paired = measures[0].key == measures[1].key
        results.append(Result(evaluation, own, other, own.minus(other.estimates, paired), source))
    return results


def forget() -> None:
    """Give back the memory of a model that nothing names any more."""
    # modules refer to one another in circles
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepared(
    folder: Path, evaluations: Sequence[Evaluation], sources: Sequence[Readable]
) -> list[Measure]:
    tokenizer = load_tokenizer(folder)
    return [
        evaluation.on(tokenizer, source)
        for evaluation, source in zip(evaluations, sources, strict=True)
    ]


def _against(
    folder: Path,
    dense: Path,
    evaluations: Sequence[Evaluation],
    sources: Sequence[Readable],
    prepared: Sequence[Sequence[Measure]],
    device: torch.device | str,
    dtype: torch.dtype | None,
    one_at_a_time: bool | None,
    scratch: Path | None,
) -> list[Result]:
    """Divergences, with both models in memory or the dense one's states on disk."""
    for evaluation, own, other in zip(evaluations, *prepared, strict=True):
        if own.key != other.key:
            raise InputError(
                f"{evaluation.path}: the tokenizers of {dense} and {folder} make different tokens "
                "of it, so distributions of the next one cannot be compared"
            )
    if scratch is not None and not scratch.is_dir():
        raise InputError(f"--scratch {scratch}: no such folder")
    with ExitStack() as stack:
        model: nn.Module = load(dense, dtype=dtype, device=device)
        if one_at_a_time is None:
            # a model that was made of this one is no larger
            needed = sum(p.numel() * p.element_size() for p in model.parameters())
            one_at_a_time = needed > HELD_SHARE * free_bytes(torch.device(device))
        references: list[Dense] = [model] * len(evaluations)
        if one_at_a_time:
            references = []
            for measure in prepared[0]:
                try:
                    made = tempfile.TemporaryDirectory(prefix="liar-states-", dir=scratch)
                except OSError as error:
                    raise InputError(
                        f"--scratch {scratch or tempfile.gettempdir()}: cannot be written "
                        f"({error.strerror}); give another"
                    ) from error
                place = stack.enter_context(made)
                references.append(cast(Recording, measure).record(model, Path(place)))
        del model
        forget()
        model = load(folder, dtype=dtype, device=device)
        found = [
            measure(model, reference)
            for measure, reference in zip(prepared[0], references, strict=True)
        ]
    return [
        Result(evaluation, own, None, own.minus(own.reference), source)
        for evaluation, own, source in zip(evaluations, found, sources, strict=True)
    ]

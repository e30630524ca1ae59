"""Layers merged into those before them (LaCo), from folder to folder."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.collapse import Outcome
from liar_ext.depth.config import remapped
from liar_ext.depth.merge import search, type_warnings
from liar_ext.depth.merge_facts import card, layer_facts, merge_facts, used_settings
from liar_ext.depth.merge_settings import MergeSettings, Schedule
from liar_ext.depth.merge_subject import Subject, opened
from liar_ext.depth.mixture import FiledSource, HeldSource, Source, mixed
from liar_ext.depth.report import layer_report
from liar_ext.depth.resident import Resident
from liar_ext.depth.rules import norm_names
from liar_ext.depth.surgery import check_places
from liar_ext.depth.trials import Evaluations, Trials
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import Execution, make_shelf
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.runtime import Runtime
from liar_ext.errors import InputError
from liar_ext.models import layout
from liar_ext.report.schema import FILE, calibration_of


def merge_layers(
    source: str | Path,
    out: str | Path,
    settings: MergeSettings,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
    weights: str = "auto",
    trace: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint of a model with merged layers; the source is only read.

    Tensors of layers that are as they were go from file to file. The result is as stock as the
    source: `from_pretrained` loads it, and it can be pruned like any other.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        settings: with the calibration.
        overwrite: replace `out` if it exists, once the new one is complete.
        execution: where hidden states wait.
        weights: `memory` keeps all layers there, `disk` reads each when it is run, `auto` is
            memory where they fit.
        trace: of a family without an adapter, find how it calls its layers by running them.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: anything in the input that cannot be used, or no merge that keeps the model
            similar enough; `out` is then as it was.
    """
    started = time.perf_counter()
    out, progress = Path(out), progress or Silent()
    execution = execution or Execution()
    folder = resolve(source)
    check_output(out, folder, overwrite=overwrite)
    subject = opened(folder, settings, execution, weights=weights, trace=trace)
    with _scratch(subject, out, execution) as scratch:
        outcome, evaluations = _searched(subject, scratch, progress)
    searched = time.perf_counter()
    warnings = [
        *left_over_warnings(subject.left_over, subject.model),
        *type_warnings(subject.model, outcome.state),
    ]
    for warning in warnings:
        progress.warn(warning)
    kept = [mixture.base for mixture in outcome.state]
    model = layout.empty(remapped(subject.reader.config, kept))
    check_places(subject.path, subject.layers, kept, model, {})
    tensors = list(_tensors(subject, outcome, model))
    specs = [spec for spec, _ in tensors]
    config = remapped(subject.config, kept)
    with output_folder(out, subject.folder, overwrite=overwrite) as made:
        writer = ShardWriter(made, specs)
        try:
            for spec, pieces in tensors:
                writer.write_pieces(spec.name, pieces)
            writer.finish()
        finally:
            writer.close()
        copy_other_files(subject.folder, made)
        ended = time.perf_counter()
        report = layer_report(
            source,
            layers=layer_facts(len(subject.layers), outcome),
            merge=merge_facts(subject.settings, len(subject.layers), outcome, evaluations),
            before=(parameter_count(subject.model), subject.reader.bytes()),
            model=model,
            bytes_after=writer.bytes,
            calibration=subject.texts.to_json(),
            # of widths that were pruned before
            calibration_before=calibration_of(subject.folder),
            warnings=warnings,
            seconds=ended - started,
            seconds_by={"search": searched - started, "write": ended - searched},
            run=_run_facts(subject),
            config=config,
            device=subject.device,
        )
        write_json(made / "config.json", config)
        write_json(made / FILE, report)
        (made / "README.md").write_text(card(report), encoding="utf-8")
    return report


def merge_plan(
    source: str | Path,
    out: str | Path,
    settings: MergeSettings,
    *,
    overwrite: bool = False,
    execution: Execution | None = None,
    weights: str = "auto",
    trace: bool = False,
) -> dict[str, Any]:
    """What `merge_layers` would do, without running a layer; arguments and errors are its own.

    Returns:
        settings as they would be used; `bases` in the order in which they are tried; the layers
        that are run at most, of a search under a given threshold; memory and where things are.
    """
    folder = resolve(source)
    check_output(Path(out), folder, overwrite=overwrite)
    subject = opened(folder, settings, execution or Execution(), weights=weights, trace=trace)
    count = len(subject.layers)
    schedule = settings.schedule(count)
    return {
        "source": str(source),
        "layers": count,
        "merge": used_settings(settings, count),
        "bases": list(schedule.bases),
        # with nothing accepted all trials are as long as can be
        "layer_evaluations_at_most": count
        + sum(_longest(schedule, base) for base in schedule.bases),
        "calibration": {
            name: value
            for name, value in subject.texts.to_json().items()
            if name not in ("sketch", "sample_ids")
        },
        "bytes": subject.needs,
        "run": _run_facts(subject),
        "warnings": left_over_warnings(subject.left_over, subject.model),
    }


def _longest(schedule: Schedule, base: int) -> int:
    """Layers that a trial at a base runs at most: with nothing merged before it."""
    gone = schedule.combine - 1
    if schedule.drop is not None:
        gone = min(gone, schedule.drop)
    return schedule.count - base - gone


def _searched(subject: Subject, scratch: Path, progress: Progress) -> tuple[Outcome, Evaluations]:
    """Run the search over the files."""
    device, reader, path = subject.device, subject.reader, subject.path
    placement = Placement(scratch, device, subject.dtype, "auto")
    files = CheckpointStore(subject.model, reader, placement)
    resident = subject.weights == "memory"
    filed = FiledSource(reader, path)
    source: Source = HeldSource(subject.layers, filed.stored) if resident else filed
    clock = Clock(device)
    clock.hidden_states = subject.hidden_states
    shelf = make_shelf(subject.hidden_states, scratch, device)
    store = Resident(files) if resident else files
    runtime = Runtime(store, device, clock, progress, shelf=shelf)
    trials = Trials(
        runtime, subject.texts.batches, source, subject.settings.similarity, keeps=resident
    )
    try:
        outcome = search(trials, subject.settings)
        trials.free()
    finally:
        files.stop()
    return outcome, trials.evaluations


def _tensors(
    subject: Subject, outcome: Outcome, model: PreTrainedModel
) -> Iterator[tuple[TensorSpec, Iterator[Tensor]]]:
    """The result's tensors in its order: where each goes, and its elements."""
    reader, path = subject.reader, subject.path
    source = FiledSource(reader, path)
    inside = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")
    for name in model.state_dict():
        match = inside.fullmatch(name)
        if match is None:
            if name in reader:
                yield _spec(reader, name, name), reader.pieces(name)
            continue
        mixture, leaf = outcome.state[int(match[1])], match[2]
        stored = f"{path}.{mixture.base}.{leaf}"
        if stored not in reader:
            continue  # a buffer that modules make themselves
        pieces = reader.pieces(stored)
        if not mixture.plain:
            layer = subject.layers[mixture.base]
            if leaf in dict(layer.named_parameters()):
                terms = mixture.terms(leaf, norm_names(layer))
                pieces = mixed(source, mixture, terms, leaf)
        yield _spec(reader, name, stored), pieces


def _spec(reader: CheckpointReader, name: str, stored: str) -> TensorSpec:
    return TensorSpec(name, reader.shape(stored), reader.dtype(stored))


def _run_facts(subject: Subject) -> dict[str, Any]:
    return {
        "device": subject.device.type,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "weights": subject.weights,
        "hidden_states": subject.hidden_states,
    }


@contextmanager
def _scratch(subject: Subject, out: Path, execution: Execution) -> Iterator[Path]:
    """A folder for hidden states on disk; of other places, one that nothing is put into.

    Raises:
        InputError: it cannot be made or written to.
    """
    if subject.hidden_states != "disk":
        yield out
        return
    parent = execution.scratch or next(p for p in Path(os.path.abspath(out)).parents if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".liar-ext-merge-", dir=parent) as folder:
            yield Path(folder)
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(parent):
            raise
        raise InputError(
            f"{parent}: hidden states cannot wait there ({error.strerror}); give a --scratch with "
            "more room, or --hidden-states device, which keeps them in memory"
        ) from error

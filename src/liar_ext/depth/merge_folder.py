"""Layers merged into those before them (LaCo), from folder to folder."""

from __future__ import annotations

import datetime
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liar_ext.calibration.batches import Calibration, make_batches
from liar_ext.calibration.sources import read
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, parameter_count
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.collapse import Outcome
from liar_ext.depth.config import remapped
from liar_ext.depth.merge import check_alike, search, type_warnings
from liar_ext.depth.merge_facts import card, layer_facts, merge_facts, used_settings
from liar_ext.depth.merge_settings import MergeSettings, Schedule
from liar_ext.depth.mixture import FiledSource, HeldSource, Source, mixed
from liar_ext.depth.resident import Resident
from liar_ext.depth.rules import norm_names
from liar_ext.depth.surgery import check_places
from liar_ext.depth.trials import Evaluations, Trials
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import HELD_SHARE, Execution, choose_place, free_bytes, make_shelf
from liar_ext.engine.inputs import compute_dtype, load_tokenizer, resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.source import with_trace
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.recipe import KINDS
from liar_ext.report.schema import FILE, LAYERS, calibration_of
from liar_ext.report.text import size

VERSION = 1
WEIGHTS = ("auto", "memory", "disk")


@dataclass(frozen=True)
class Subject:
    """A checkpoint whose layers can be merged, and all that a merge of them needs to know.

    Attributes:
        config: of the result's family: the source's, without a trace.
        reader, model: bound to each other; the model is on `meta`. path, layers: of its layers.
        texts: what models are compared on.
        weights: where the layers are: `memory`, or `disk`, where each is read when it is run.
        hidden_states: where these wait.
        needs: bytes of the layers and what is beside them in memory, of one layer, and of what
            waits.
    """

    folder: Path
    config: dict[str, Any]
    reader: CheckpointReader
    model: PreTrainedModel
    left_over: list[str]
    path: str
    layers: nn.ModuleList
    settings: MergeSettings
    texts: Calibration
    device: torch.device
    dtype: torch.dtype
    weights: str
    hidden_states: str
    needs: dict[str, int]


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
    warnings = [*_left_over(subject), *type_warnings(subject.model, outcome.state)]
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
        report = {
            "version": VERSION,
            "kind": LAYERS,
            "source": str(source),
            "date": datetime.date.today().isoformat(),
            "layers": layer_facts(len(subject.layers), outcome),
            "merge": merge_facts(subject.settings, len(subject.layers), outcome, evaluations),
            "totals": {
                "parameters_before": parameter_count(subject.model),
                "parameters_after": parameter_count(model),
                "bytes_before": subject.reader.bytes(),
                "bytes_after": writer.bytes,
            },
            "calibration": subject.texts.to_json(),
            # of widths that were pruned before
            "calibration_before": calibration_of(subject.folder),
            "warnings": warnings,
            "seconds": ended - started,
            "seconds_by": {"search": searched - started, "write": ended - searched},
            "run": _run_facts(subject),
            "config": config,
            "environment": environment(subject.device),
        }
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
        "warnings": _left_over(subject),
    }


def _longest(schedule: Schedule, base: int) -> int:
    """Layers that a trial at a base runs at most: with nothing merged before it."""
    gone = schedule.combine - 1
    if schedule.drop is not None:
        gone = min(gone, schedule.drop)
    return schedule.count - base - gone


def opened(
    folder: Path,
    settings: MergeSettings,
    execution: Execution,
    *,
    weights: str = "auto",
    trace: bool = False,
) -> Subject:
    """Check everything that can be checked before a layer is run.

    Raises:
        InputError: see `merge_layers`.
    """
    if weights not in WEIGHTS:
        raise InputError(f"--weights {weights}: choose from {', '.join(WEIGHTS)}")
    device = resolve_device(settings.device)
    reader = CheckpointReader(folder)
    config = reader.config
    if trace:
        if layout.KEY in config:
            raise InputError(f"{folder}: has shapes of its own; --trace is for dense models")
        reader.config = with_trace(config, KINDS)
    model = layout.empty(reader.config)
    adapter = adapter_for(model.config)
    left_over = reader.bind(model)
    path, layers = adapter.layer_list(model)
    schedule = settings.schedule(len(layers))
    check_alike(path, layers, schedule)
    remapped(config, range(len(layers)))  # refuses what cannot be moved, by name
    texts = load_texts(folder, model, settings)
    dtype = compute_dtype(settings.dtype, device) or reader.main_dtype()
    needs = _needs(model, layers, schedule, texts, dtype)
    free = free_bytes(device)
    if weights == "memory" and needs["weights"] > free:
        raise InputError(
            f"--weights memory: all layers take {size(needs['weights'])}, {size(free)} are free; "
            "use --weights disk, which holds one at a time"
        )
    if weights == "auto":
        weights = "memory" if needs["weights"] <= HELD_SHARE * free else "disk"
    place = choose_place(execution.hidden_states, needs["hidden_states"], device)
    return Subject(
        folder,
        config,
        reader,
        model,
        left_over,
        path,
        layers,
        settings,
        texts,
        device,
        dtype,
        weights,
        place,
        needs,
    )


def load_texts(folder: Path, model: PreTrainedModel, settings: MergeSettings) -> Calibration:
    """The texts that models are compared on, each with its special tokens, padded on the right.

    A text is a line of a `.txt`, a record of other files, or a window of a token file.

    Raises:
        InputError: no or unusable text, or no tokenizer.
    """
    if settings.calibration is None:
        raise InputError("--calibration is missing: give a .txt, .jsonl, .csv or token file")
    corpus = read(settings.calibration)
    text = text_config(model.config)
    tokenizer = None
    if corpus.tokens is None:
        tokenizer = load_tokenizer(folder)
        # positions count from the left; what is padded with does not matter, it is masked
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            known = tokenizer.eos_token or tokenizer.unk_token
            tokenizer.pad_token = known or tokenizer.convert_ids_to_tokens(0)
    return make_batches(
        corpus,
        tokenizer,
        packed=False,
        samples=settings.texts,
        seq_len=min(settings.seq_len, adapter_for(model.config).max_positions(text)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        vocab_size=text.vocab_size,
    )


def _needs(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    schedule: Schedule,
    texts: Calibration,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes of all weights, with merged ones, if they are in memory; of one layer; of what waits:
    states in front of each base, at the end, and on both sides of a layer."""
    layer = max(sum(p.numel() for p in each.parameters()) for each in layers)
    bases = len(schedule.bases)
    # merged layers: those that were accepted, and the one that is tried
    most = -(-bases // schedule.interval)
    most = 1 + (most if schedule.drop is None else min(most, schedule.drop))
    positions = sum(batch.input_ids.numel() for batch in texts.batches)
    state = positions * text_config(model.config).hidden_size
    return {
        "weights": (parameter_count(model) + most * layer) * dtype.itemsize,
        "layer": layer * dtype.itemsize,
        "hidden_states": (bases + 3) * state * dtype.itemsize,
    }


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
    norms = norm_names(subject.layers[0])
    own = {name for name, _ in subject.layers[0].named_parameters()}
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
        if leaf in own and not mixture.plain:
            pieces = mixed(source, mixture, mixture.terms(leaf, norms), leaf)
        else:
            pieces = reader.pieces(stored)
        yield _spec(reader, name, stored), pieces


def _spec(reader: CheckpointReader, name: str, stored: str) -> TensorSpec:
    return TensorSpec(name, reader.shape(stored), reader.dtype(stored))


def _left_over(subject: Subject) -> list[str]:
    if not subject.left_over:
        return []
    return [
        f"{len(subject.left_over)} tensors of the source are no part of "
        f"{type(subject.model).__name__} and were left out, first {subject.left_over[0]}"
    ]


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

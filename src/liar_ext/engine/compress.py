"""`liar_ext.compress`: from checkpoint to checkpoint, a layer at a time, on one process or many."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.calibration.batches import Batch, Calibration, first_samples
from liar_ext.checkpoint.job import Job, clear_finished, job_folder, open_job
from liar_ext.checkpoint.journal import check_identity
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.checkpoint.writer import check_output, copy_other_files, writing
from liar_ext.costs import gradient_held_bytes, held_bytes
from liar_ext.engine.compression import Compression, write_records
from liar_ext.engine.driver import targeted_layers
from liar_ext.engine.execution import Execution, choose_place, make_shelf
from liar_ext.engine.inputs import (
    check_backends,
    chosen_backends,
    compute_dtype,
    load_calibration,
    resolve_device,
)
from liar_ext.engine.keeper import Keeper
from liar_ext.engine.ledger import FILE as SEARCH_FILE
from liar_ext.engine.paths import paths_for
from liar_ext.engine.progress import Progress
from liar_ext.engine.provenance import SourceSums
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.source import dense_checkpoint
from liar_ext.engine.statistics import least_segments, segments
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.latency import LatencyTable
from liar_ext.models import adapter_for, text_config
from liar_ext.policy_memory import policy_held_bytes
from liar_ext.recipe import Recipe
from liar_ext.report import Report
from liar_ext.search_costs import search_held_bytes
from liar_ext.survey import needs_tokens


def compress(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
    ranks: Ranks | None = None,
    trace: bool = False,
) -> Report:
    """Prune a checkpoint into a new folder, layer by layer; the source is only read.

    Args:
        source: folder or hub id; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
        execution: where hidden states wait, how often the journal is written, resuming.
        ranks: the processes that share the work; None is this one alone. All call this with the
            same arguments; `out` is on a file system that all of them see.
        trace: of a family without an adapter, find the Sites by running its layers.
    Returns:
        the Report, as in `out/liar_report.json`.
    Raises:
        InputError: anything in the input that cannot be used; `out` is then as it was. What was
            done by then is kept beside it if the journal has an entry.
    """
    started = time.perf_counter()
    execution, ranks = execution or Execution(), ranks or Ranks.single()
    folder = resolve(source)
    check_output(Path(out), folder, overwrite=overwrite or execution.resume)
    device = resolve_device(recipe.device) if ranks.size == 1 else ranks.device
    check_backends(device)
    reader, model, left_over = dense_checkpoint(folder, recipe.target if trace else None)
    adapter = adapter_for(model.config)
    paths_for(recipe.target_signal, adapter, model.config)  # refuses by name
    calibration = load_calibration(folder, model, recipe)
    dtype = compute_dtype(recipe.dtype, device) or reader.main_dtype()
    identity = identity_of(recipe, reader, calibration, device, dtype)
    for name, value in identity.items():
        ranks.same(name, value)
    if execution.resume:
        before = ranks.broadcast(_finished(Path(out), reader, identity) if not ranks.rank else None)
        if before is not None:
            return before
    with (
        _shared_job(Path(out), folder, overwrite, execution.resume, ranks) as job,
        _scratch(job, execution, ranks) as scratch,
    ):
        entry = job.journal.read()
        if entry is not None:
            known = {n: v for n, v in entry["identity"].items() if n != "source_sha256"}
            check_identity(known, identity, job.journal.path)
        sums = SourceSums(reader, ranks)
        done = entry["written"] if entry else {}
        placement = Placement(job.output, device, dtype, recipe.dtype, ranks, done)
        store = CheckpointStore(model, reader, placement)
        try:
            run = Compression(store, reader.config, recipe, device, progress, ranks)
            run.keeper = Keeper(
                job,
                store,
                identity,
                seconds=execution.journal_seconds,
                layers=len(adapter.layer_list(model)[1]),
                ranks=ranks,
                source=sums,
            )
            held = held_bytes_of(model, recipe, calibration.batches, dtype.itemsize, ranks.size)
            place = choose_place(execution.hidden_states, held, device, ranks.local_size)
            run.facts["backends"] = chosen_backends(device, dtype)
            run.facts["hidden_states"] = run.clock.hidden_states = place
            run.shelf = make_shelf(place, scratch, device)
            run.library = _library(
                job, execution, recipe, identity, store, sums, ranks, calibration.batches
            )
            if left_over:
                run.warn(
                    f"{len(left_over)} tensors of the source are no part of "
                    f"{type(model).__name__} and were left out, first {left_over[0]}"
                )
            limit = adapter.max_positions(text_config(model.config))
            if adapter.decoder and recipe.seq_len > limit:
                run.warn(
                    f"--seq-len {recipe.seq_len}: the model has {limit} positions; calibrated "
                    f"with windows of {limit} tokens"
                )
            report = run.run(calibration.batches, str(source), calibration.to_json())
            with run.clock.phase("write"):
                store.finish()
                report.source_files = run.keeper.source_sums()
        finally:
            store.stop()
            sums.stop()
        assert store.writer is not None
        if recipe.dtype != "auto":
            report.config["dtype"] = recipe.dtype
            report.config.pop("torch_dtype", None)
        report.totals |= {"bytes_before": reader.bytes(), "bytes_after": store.writer.bytes}
        report.seconds = {**run.clock.seconds, "total": time.perf_counter() - started}
        if ranks.rank == 0:
            copy_other_files(folder, job.output)
            write_records(job.output, report)
            if (tried := job.folder / SEARCH_FILE).exists():
                shutil.copyfile(tried, job.output / SEARCH_FILE)
            job.complete()
        ranks.barrier()
    return report


def identity_of(
    recipe: Recipe,
    reader: CheckpointReader,
    calibration: Calibration,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON data."""
    tokens = hashlib.sha256()
    for batch in calibration.batches:
        for tensor in (batch.input_ids, batch.attention_mask):
            tokens.update(json.dumps(list(tensor.shape)).encode())
            tokens.update(tensor.contiguous().numpy().tobytes())
    here = environment(device)
    measured = {} if recipe.latency is None else {"latency": LatencyTable.read(recipe.latency)}
    return {
        "recipe": recipe.to_json(),
        **{name: table.sha256 for name, table in measured.items()},
        "source": {
            "config": hashlib.sha256(json.dumps(reader.config).encode()).hexdigest(),
            **{file: found["size"] for file, found in reader.sizes().items()},
        },
        "calibration": {
            "source": calibration.source,
            "corpus_sha256": calibration.sha256,
            "tokens_sha256": tokens.hexdigest(),
        },
        "versions": {name: here[name] for name in ("liar_ext", "torch", "transformers")},
        "compute": {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            **chosen_backends(device, dtype),
        },
    }


def held_bytes_of(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Batch], item: int, ranks: int
) -> int:
    """Bytes that wait on the shelf of the rank with most."""
    adapter = adapter_for(model.config)
    windows = first_samples(batches, recipe.gradient_samples)
    own = _positions(batches, least_segments(recipe), ranks)
    tried = first_samples(batches, recipe.search_samples)
    hidden = text_config(model.config).hidden_size
    # nothing of the windows is held out
    theirs = _positions(windows, 1, ranks)
    return max(
        held_bytes(model, adapter, recipe, own, item),
        gradient_held_bytes(model, adapter, recipe, theirs, item),
        # each rank has all
        policy_held_bytes(model, recipe, _positions(batches, 1, 1), item),
        search_held_bytes(recipe, _positions(tried, len(tried), ranks), hidden, item),
    )


def _positions(batches: Sequence[Batch], least: int, ranks: int) -> int:
    """Tokens, with padding, of the rank with most; ranks have whole segments."""
    count = segments(batches, least)[-1] + 1
    return sum(b.input_ids.numel() for b in batches) * -(-count // ranks) // count


@contextmanager
def _shared_job(
    out: Path, source: Path, overwrite: bool, resume: bool, ranks: Ranks
) -> Iterator[Job]:
    """The job folder: rank 0 makes and locks it, the others look for it.

    Raises:
        InputError: another rank does not see the folder that rank 0 made.
    """
    if ranks.rank == 0:
        with open_job(out, source, overwrite=overwrite, resume=resume) as job:
            ranks.barrier()
            yield job
        return
    ranks.barrier()
    job = Job(job_folder(out), out)
    if not job.scratch.is_dir():
        raise InputError(
            f"--out {out}: rank {ranks.rank} does not see {job.folder}, which rank 0 made; give a "
            "folder on a file system that all hosts share"
        )
    with writing(job.out, job.folder):
        yield job


def _finished(out: Path, reader: CheckpointReader, identity: dict[str, Any]) -> Report | None:
    """The report of `out` if it is what this run would make: then there is nothing to resume.

    A run may have been killed after its output had its name, or nobody saw that it ended.
    """
    if Job(job_folder(out), out).unfinished:
        return None
    try:
        report = Report.read(out)
    except InputError:
        return None
    calibration = report.calibration.get("sha256"), report.calibration.get("source")
    wanted = identity["calibration"]["corpus_sha256"], identity["calibration"]["source"]
    versions = {name: report.environment.get(name) for name in identity["versions"]}
    if report.recipe != identity["recipe"] or calibration != wanted:
        return None
    if report.latency.get("sha256") != identity.get("latency"):
        return None
    if versions != identity["versions"] or report.source_files != reader.hashes():
        return None
    clear_finished(out)
    return report


@contextmanager
def _scratch(job: Job, execution: Execution, ranks: Ranks) -> Iterator[Path]:
    """A folder of this process for what does not outlive it.

    Raises:
        InputError: what is wrong with files in it, with the options that help.
    """
    if execution.scratch is None:
        folder, option = job.scratch / f"rank-{ranks.rank}", f"--out {job.out}"
    else:
        # the same for this output each time: what a killed run left there is found again
        place = hashlib.sha256(os.fsencode(job.out)).hexdigest()[:8]
        folder = execution.scratch / f"liar-ext{job.folder.name}-{place}-{ranks.rank}"
        option = f"--scratch {execution.scratch}"
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(folder):
            raise
        raise InputError(
            f"{option}: hidden states cannot wait there ({error.strerror}); give a --scratch with "
            "more room, or --hidden-states device, which keeps them in memory"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def moments_fingerprint(
    identity: dict[str, Any], source: dict[str, str], batches: Sequence[Batch], recipe: Recipe
) -> dict[str, Any]:
    """All that Moments of the dense path depend on.

    Args:
        identity: of `identity_of`; source: sha256 of its files; batches: as the recipe has them.
    """
    found = {name: identity[name] for name in ("versions", "compute")}
    # the tokens, under whatever name they were read
    found["calibration"] = identity["calibration"]["tokens_sha256"]
    parts = segments(batches, least_segments(recipe))
    if parts != segments(batches):
        # float32 sums of other segments have other roundings
        found["segments"] = parts[-1] + 1
    found["source"] = {"config": identity["source"]["config"], **source}
    return found


def _library(
    job: Job,
    execution: Execution,
    recipe: Recipe,
    identity: dict[str, Any],
    store: CheckpointStore,
    sums: SourceSums,
    ranks: Ranks,
    batches: Sequence[Batch],
) -> Any:
    """Moments on disk: where the user wants them, or where they save a second pass.

    Only those of the dense path can be used again, so `--statistics oneshot` only.

    Raises:
        InputError: a folder of Moments was given, and statistics are sequential.
    """
    if recipe.statistics != "oneshot":
        if execution.moments is not None:
            raise InputError(
                "--moments: sequential statistics depend on what was pruned before and cannot be "
                "used again; give --statistics oneshot too"
            )
        return None
    from liar_ext.engine.moments_store import MomentsStore

    folder = execution.moments
    if folder is None:
        if not needs_tokens(recipe):
            return None
        adapter = adapter_for(store.model.config)
        columns = [
            site.columns
            for index in targeted_layers(store, recipe)
            for site in adapter.sites_of(store.model, index, recipe.target)
        ]
        folder = job.folder / "moments"
        # what an interrupted run has begun with, it goes on with
        wanted = folder.exists()
        if not wanted and job.journal.read() is None:
            # with twice the room: the output is to fit as well
            room = shutil.disk_usage(job.folder).free
            sizes = columns * (2 if recipe.chooses_ridge else 1)
            wanted = 2 * MomentsStore.bytes_needed(sizes) <= room
        if not ranks.broadcast(wanted):
            return None
    fingerprint = moments_fingerprint(identity, sums.get(), batches, recipe)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        MomentsStore(folder, fingerprint)
    ranks.barrier()
    return MomentsStore(folder, fingerprint)

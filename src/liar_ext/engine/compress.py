"""`liar_ext.compress`: from checkpoint to checkpoint, a layer at a time, on one process or many."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch, first_samples
from liar_ext.calibration.pairs import INSTEAD, WINDOWS
from liar_ext.checkpoint.job import Job, clear_finished, job_folder, open_job
from liar_ext.checkpoint.journal import check_identity, sync_path
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import (
    CheckpointReader,
    left_over_warnings,
    parameter_count,
    read_json,
)
from liar_ext.checkpoint.store import CheckpointStore, Placement
from liar_ext.checkpoint.writer import check_output, copy_other_files, write_json, writing
from liar_ext.costs import gradient_held_bytes, held_bytes
from liar_ext.depth.choice import LayerChoice, choice_states, choose
from liar_ext.depth.shorten import shortened_checkpoint
from liar_ext.engine.budgets import longest
from liar_ext.engine.clock import Clock
from liar_ext.engine.compression import Compression, few_tokens, write_records
from liar_ext.engine.execution import Execution, choose_place, make_shelf
from liar_ext.engine.identity import identity_of, library_of
from liar_ext.engine.inputs import (
    check_backends,
    chosen_backends,
    compute_dtype,
    load_calibration,
    resolve_device,
)
from liar_ext.engine.keeper import Keeper, beginning
from liar_ext.engine.ledger import FILE as SEARCH_FILE
from liar_ext.engine.paths import paths_for
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.provenance import SourceSums
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.source import dense_checkpoint
from liar_ext.engine.spans import LeftOut
from liar_ext.engine.statistics import least_segments, segments
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, text_config
from liar_ext.policy_memory import policy_held_bytes
from liar_ext.recipe import Recipe
from liar_ext.report import Report
from liar_ext.report.text import layers
from liar_ext.search_costs import search_held_bytes

# in the folder of a job: the layers that are left out
LAYERS_FILE = "layers.json"


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
    paths_for(recipe, adapter, model.config)  # refuses by name
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
        ExitStack() as opened,
    ):
        entry = job.journal.read()
        if execution.resume and entry is None and progress is not None:
            progress.tell(
                f"--resume: nothing beside {out} to go on with; starts from the beginning"
            )
        if entry is not None:
            known = {n: v for n, v in entry["identity"].items() if n != "source_sha256"}
            check_identity(known, identity, job.journal.path)
        sums = SourceSums(reader, ranks)
        opened.callback(sums.stop)
        done = entry["written"] if entry else {}
        placement = Placement(job.output, device, dtype, recipe.dtype, ranks, done)
        held = held_bytes_of(model, recipe, calibration.batches, dtype.itemsize, ranks.size)
        place = choose_place(execution.hidden_states, held, device, ranks.local_size)
        clock, shelf = Clock(device), make_shelf(place, scratch, device)
        sizes = {"parameters_before": parameter_count(model), "bytes_before": reader.bytes()}
        began = time.monotonic()
        choice: LayerChoice | None = None
        left_out: LeftOut | None = None
        if recipe.shortens:
            runtime = Runtime(
                opened.enter_context(CheckpointStore(model, reader, placement)),
                device,
                clock,
                progress or Silent(),
                ranks,
                shelf,
            )
            choice = _chosen(recipe, runtime, calibration.batches, job)
            reader, model = shortened_checkpoint(reader, runtime.model, choice.kept)
            left_out = LeftOut(runtime, choice.gaps) if recipe.spans else None
        with CheckpointStore(model, reader, placement) as store:
            run = Compression(store, reader.config, recipe, device, progress, ranks)
            run.keeper = Keeper(
                job,
                store,
                identity,
                seconds=execution.journal_seconds,
                layers=len(adapter.chain(model)),
                ranks=ranks,
                source=sums,
                since=began,
            )
            if choice is not None and run.keeper.resumed is None:
                # models without layers may have been tried for hours
                run.keeper.keep(beginning(recipe.seed), {})
            run.clock, run.shelf, run.left_out = clock, shelf, left_out
            run.layers = choice.to_json() if choice is not None else {}
            run.facts["backends"] = chosen_backends(device, dtype)
            run.facts["hidden_states"] = run.clock.hidden_states = place
            run.library = library_of(
                job,
                execution,
                recipe,
                identity,
                store,
                sums,
                ranks,
                calibration.batches,
                None if choice is None else choice.dropped,
            )
            for text in left_over_warnings(left_over, model):
                run.warn(text)
            if calibration.form == WINDOWS:
                run.warn(f"calibrated on {WINDOWS}; {INSTEAD}")
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
        assert store.writer is not None
        if recipe.dtype != "auto":
            report.config["dtype"] = recipe.dtype
            report.config.pop("torch_dtype", None)
        report.totals |= {**sizes, "bytes_after": store.writer.bytes}
        report.seconds = {**run.clock.seconds, "total": time.perf_counter() - started}
        if ranks.rank == 0:
            copy_other_files(folder, job.output)
            write_records(job.output, report)
            if (tried := job.folder / SEARCH_FILE).exists():
                shutil.copyfile(tried, job.output / SEARCH_FILE)
            job.complete()
        ranks.barrier()
    return report


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
        held_bytes(model, adapter, recipe, own, item, longest(batches)),
        gradient_held_bytes(model, adapter, recipe, theirs, item),
        # each rank has all
        policy_held_bytes(model, recipe, _positions(batches, 1, 1), item),
        search_held_bytes(recipe, _positions(tried, len(tried), ranks), hidden, item),
        choice_states(
            recipe,
            len(adapter.chain(model)),
            own=own,
            gradients=theirs,
            losses=_positions(tried, 1, ranks),
        )
        * hidden
        * item,
    )


def _positions(batches: Sequence[Batch], least: int, ranks: int) -> int:
    """Tokens, with padding, of the rank with most; ranks have whole segments."""
    if not batches:
        return 0
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
    calibration = report.calibration.get("sha256", ""), report.calibration.get("source", "")
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


def _chosen(recipe: Recipe, runtime: Runtime, batches: Sequence[Batch], job: Job) -> LayerChoice:
    """The layers that are left out: chosen now, or by the run that this one goes on with."""
    path = job.folder / LAYERS_FILE
    ranks = runtime.ranks
    if ranks.broadcast(job.journal.read() is not None and path.exists()):
        return LayerChoice.from_json(ranks.broadcast(read_json(path) if not ranks.rank else None))
    # before anything is computed that it would be for nothing
    few_tokens(runtime.store, recipe, batches, sum(batch.tokens for batch in batches))
    found = LayerChoice.from_json(ranks.broadcast(choose(recipe, runtime, batches).to_json()))
    runtime.progress.tell(
        f"left out, of {found.layers} layers counted from 0: {layers(found.dropped)}"
    )
    if ranks.rank == 0:
        # before the first entry of the journal: with that, a later run finds it
        write_json(path, found.to_json())
        sync_path(path)
    return found

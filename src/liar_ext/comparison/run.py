"""`compare`: every cell of a grid measured, each finished one kept, and the result written."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from liar_ext.allocation import ALLOCATIONS
from liar_ext.calibration.overlap import warning
from liar_ext.checkpoint.load import resolve
from liar_ext.comparison.grid import Cell, Grid
from liar_ext.comparison.ledger import HELD_OUT, MOMENTS, Ledger, check_folder, open_ledger
from liar_ext.comparison.result import assemble, write
from liar_ext.comparison.subject import SCRATCH, Subject
from liar_ext.engine.budgets import targeted_layers
from liar_ext.engine.execution import Execution
from liar_ext.engine.moments_store import MomentsStore
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError, Interrupted, LiarError
from liar_ext.evaluation.task import Evaluation, known
from liar_ext.models import adapter_for
from liar_ext.report.text import number, time_left
from liar_ext.survey import reads_of

Say = Callable[[str], None]


def compare(
    source: str | Path,
    out: str | Path,
    grid: Grid,
    evaluations: Sequence[Evaluation],
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_moments: bool = False,
    execution: Execution | None = None,
    say: Say | None = None,
    trace: bool = False,
) -> dict[str, Any]:
    """Prune and evaluate one model in every way that a grid names.

    The model is read once and stays in memory, dense; each cell prunes a copy that shares what it
    does not change. With `statistics` oneshot, and for the scores of allocations, cells share
    Moments of the dense path on disk, so that one forward serves them all.

    Args:
        source: folder or hub id; out: folder for the result.
        evaluations: one or more, for the dense model and for every cell.
        resume: go on with what is in `out`; overwrite: start again there.
        keep_moments: leave `out/moments`, for `liar prune --moments`.
        execution: where hidden states wait.
        say: takes each line for the user.
        trace: of a family without an adapter, find the Sites by running its layers.
    Returns:
        what is in `out/comparison.json`; cells that failed have a status that says so.
    Raises:
        InputError: the model, the texts or `out` cannot be used, or `out` was made from others.
        Interrupted: by Ctrl-C or a signal; finished cells are kept.
    """
    say = say or _to_stderr
    out = Path(os.path.abspath(out))
    if not evaluations:
        raise InputError(f"--eval is missing: give {known(form='{kind}={form}')}")
    folder = resolve(source)
    check_folder(out, folder, resume=resume, overwrite=overwrite)
    for evaluation in evaluations:
        evaluation.identity()  # a file that cannot be read is refused before anything is
    subject = Subject(folder, grid, evaluations, execution or Execution(), trace)
    grid = subject.grid
    identity = subject.identity()
    with open_ledger(out, folder, identity, resume=resume, overwrite=overwrite) as ledger:
        for left in out.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        notes = _notes(subject)
        for note in notes:
            say(f"warning: {note}")
        for coordinates, reason in grid.skipped:
            say(f"skipped {_shown(coordinates)}: {reason}")
        try:
            _work(subject, grid, ledger, identity, say)
        except KeyboardInterrupt as error:
            if not ledger.entries:
                raise
            cells = grid.computations()
            done = sum(ledger.done(cell.key) for cell in cells)
            raise Interrupted(
                f"interrupted after {done} of {len(cells)} cells; --resume goes on"
            ) from error
        result = assemble(source, subject, grid, ledger, identity, notes)
        if not keep_moments and not result["counts"]["failed"]:
            MomentsStore.delete(out / MOMENTS / HELD_OUT)
            MomentsStore.delete(out / MOMENTS)
        write(out, result)
    return result


def _work(subject: Subject, grid: Grid, ledger: Ledger, identity: dict[str, Any], say: Say) -> None:
    cells = grid.computations()
    todo = [cell for cell in cells if not ledger.done(cell.key)]
    same = len(grid.cells) - len(cells)
    say(
        f"{len(grid.cells)} cell{'s' * (len(grid.cells) > 1)}"
        + (f", {same} of them the same computation as another" if same else "")
        + (f", {len(cells) - len(todo)} done before" if len(todo) < len(cells) else "")
    )
    if not todo:
        return
    dense = ledger.dense
    if dense is None:
        dense = subject.dense()
        ledger.add_dense(dense)
        say(f"dense: {_metrics(dense)}; one plain forward {dense['forward_seconds']:.2f} s")
    libraries = _libraries(subject, cells, ledger.folder / MOMENTS, identity, say)
    before, started = len(cells) - len(todo), time.monotonic()
    for position, cell in enumerate(todo, before + 1):
        library = libraries.get(cell.recipe.chooses_ridge)
        entry = _tried(subject, cell, library, dense["forward_seconds"], ledger.folder)
        ledger.add({"key": cell.key, "recipe": cell.recipe.to_json(), **entry})
        left = time_left(position - before, len(todo), time.monotonic() - started)
        say(f"[{position}/{len(cells)}] {cell.label}: {_line(entry)}{left}")


def _tried(
    subject: Subject,
    cell: Cell,
    library: MomentsStore | None,
    forward_seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """A cell's figures, or in one line why there are none."""
    try:
        found = subject.measure(cell, library, forward_seconds, folder)
        json.dumps(found, allow_nan=False)
    except Exception as error:  # whatever one cell trips over, the others are still wanted
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # libraries may wrap what they do not expect
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, LiarError) else f"{type(error).__name__}: "
        return {"status": "failed", "error": kind + text}
    return {"status": "done", "error": None, **found}


def _libraries(
    subject: Subject, cells: Sequence[Cell], folder: Path, identity: dict[str, Any], say: Say
) -> dict[bool, MomentsStore]:
    """Moments of the dense path on disk, by whether tokens are held out to choose a ridge.

    Each where two cells or more read them and there is room. Sums of tokens that are cut otherwise
    have other roundings, so the two are not mixed.
    """
    model, adapter = subject.model, adapter_for(subject.model.config)
    found = {}
    for chooses, own in ((False, folder), (True, folder / HELD_OUT)):
        users = [
            cell.recipe
            for cell in cells
            if cell.recipe.chooses_ridge == chooses
            and (
                cell.recipe.statistics == "oneshot"
                or reads_of(cell.recipe) in ("columns", "moments")
                or ALLOCATIONS[cell.recipe.allocation].search is not None
            )
        ]
        if len(users) < 2:
            continue
        sites = {
            (index, site.kind): site.columns
            for recipe in users
            for index in targeted_layers(InMemory(model), recipe)
            for site in adapter.sites_of(model, index, recipe.target)
        }
        needed = MomentsStore.bytes_needed(sites.values()) * (2 if chooses else 1)
        if not own.exists() and needed > shutil.disk_usage(folder.parent).free:
            say(
                f"warning: no room for {needed:,} bytes of Moments in {own}: every cell takes "
                "its own forward passes"
            )
            continue
        # the first cell computes what all of them read in its forward pass
        own.mkdir(parents=True, exist_ok=True)
        MomentsStore.ask(own, dict.fromkeys((recipe.target, recipe.layers) for recipe in users))
        found[chooses] = subject.library(own, identity, users[0])
    return found


def _notes(subject: Subject) -> list[str]:
    """What the reader of the figures should know."""
    calibration = subject.calibration.to_json()
    notes = []
    for evaluation in subject.evaluations:
        # a text that no calibration could be read from cannot have been one
        with suppress(InputError):
            notes.append(warning(calibration, evaluation.corpus()))
    if subject.left_over:
        notes.append(
            f"{len(subject.left_over)} tensors of the source are no part of the model and were "
            f"left out, first {subject.left_over[0]}"
        )
    return [note for note in notes if note is not None]


def _metrics(entry: dict[str, Any]) -> str:
    return ", ".join(f"{m['metric']} {number(m['value'], 5)}" for m in entry["metrics"].values())


def _line(entry: dict[str, Any]) -> str:
    if entry["status"] == "failed":
        return f"failed: {entry['error']}"
    warnings = len(entry["warnings"])
    return (
        f"{_metrics(entry)}; residual {entry['residual']['mean']:.4f}, "
        f"{entry['seconds']['total']:.2f} s ({entry['relative_to_forward']:.2f} forwards)"
        + (f", {warnings} warning{'s' if warnings > 1 else ''}" if warnings else "")
    )


def _shown(coordinates: dict[str, Any]) -> str:
    parts = (",".join(v) if isinstance(v, list) else str(v) for v in coordinates.values())
    return " ".join(parts)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

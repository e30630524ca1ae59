"""Many compressions from one file: read, validated and put in order before anything runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from liar_ext.calibration.sources import refuse_missing_path
from liar_ext.checkpoint.job import job_folder
from liar_ext.checkpoint.writer import check_output
from liar_ext.errors import InputError
from liar_ext.latency import LatencyTable
from liar_ext.presets import fields_for
from liar_ext.recipe import Recipe
from liar_ext.report.schema import Report

OWN_KEYS = {"source": str, "out": str, "name": str, "overwrite": bool, "preset": str}
# what the Moments of the dense path depend on, beside the source
SHARED = ("calibration", "samples", "seq_len", "batch_size", "seed", "dtype", "device")


class JobsError(InputError):
    """Lines of a jobs file that cannot be used. Attributes: `problems`, one text each."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 1} more lines)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}; nothing was started")
        self.problems = tuple(problems)


@dataclass(frozen=True)
class BatchJob:
    """One line. Attributes: `finished`, there is a result of the same source and recipe already."""

    line: int
    name: str
    source: str
    out: str
    recipe: Recipe
    overwrite: bool
    finished: bool = False

    @property
    def reads(self) -> str:
        """The source as it compares. A hub id is where a folder of its name would be."""
        return os.path.realpath(self.source)

    @property
    def writes(self) -> str:
        return os.path.realpath(self.out)

    def collides(self, other: BatchJob) -> bool:
        """Whether one writes what the other reads, so that their order matters."""
        return _overlap(self.reads, other.writes) or _overlap(self.writes, other.reads)

    def reads_from(self, other: BatchJob) -> bool:
        """Whether its source is what an earlier line writes."""
        return other.line < self.line and _within(self.reads, other.writes)

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted run into `out` left what `--resume` goes on from."""
        return job_folder(Path(self.out)).joinpath("journal.json").exists()


def read_jobs(
    file: Path,
    defaults: Mapping[str, Any],
    *,
    preset: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    look: Callable[[BatchJob], None] | None = None,
) -> list[BatchJob]:
    """All jobs of a file, in its order; blank lines do not count. Touches nothing.

    Args:
        defaults: Recipe fields under those of the lines.
        preset: under both, for jobs that name no other; of `presets.PRESETS`.
        overwrite: for jobs that say nothing about it; resume: a result of the same source and
            recipe is no obstacle but makes its job `finished`.
        look: raises InputError for a source that cannot be used; asked of those that are there
            already, of jobs that are to be run.
    Raises:
        JobsError: bad lines, all of them. InputError: the file cannot be read, or has no jobs.
    """
    try:
        # not splitlines: JSON strings may hold separators that only Unicode takes for line ends
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: no such file; give a file with one JSON object a line"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    jobs: list[BatchJob] = []
    problems: dict[int, str] = {}
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                jobs.append(_parse(number, text, defaults, preset, overwrite))
            except InputError as error:
                problems[number] = str(error)
    checked: list[BatchJob] = []
    for position, job in enumerate(jobs):
        try:
            checked.append(_checked(job, checked, jobs[position + 1 :], resume, look))
        except InputError as error:
            problems[job.line] = str(error)
            checked.append(job)
    if problems:
        raise JobsError([f"{file}:{line}: {problems[line]}" for line in sorted(problems)])
    if not jobs:
        raise InputError(f"{file}: has no jobs; give one JSON object a line")
    return checked


def ordered(jobs: Sequence[BatchJob]) -> list[BatchJob]:
    """The order to run in: file order, but groups together, their widest member first.

    Of two jobs of which one writes what the other reads, the earlier line stays first.
    """
    groups = group_keys(jobs)
    left, found = list(jobs), list[BatchJob]()

    def ready(job: BatchJob) -> bool:
        return not any(o.line < job.line and o.collides(job) for o in left)

    while left:
        group = groups[left[0].line]
        # the first line that is left waits for nobody
        chosen: BatchJob | None = left[0]
        if group is not None:
            chosen = min(filter(ready, _members(left, groups, group)), key=_narrowness)
        while chosen is not None:
            left.remove(chosen)
            found.append(chosen)
            members = _members(left, groups, group) if group is not None else []
            chosen = min(filter(ready, members), key=_narrowness, default=None)
    return found


def group_keys(jobs: Sequence[BatchJob]) -> dict[int, str | None]:
    """By line, what jobs that can share Moments have in common; None on the pruned path."""
    found: dict[int, str | None] = {}
    for job in jobs:
        if job.recipe.statistics != "oneshot" or job.recipe.shortens:
            found[job.line] = None
            continue
        values = {name: getattr(job.recipe, name) for name in SHARED}
        file = os.path.expanduser(values["calibration"])
        if os.path.exists(file):
            values["calibration"] = os.path.realpath(file)
        # a source that a job in between writes anew is another one
        edition = sum(o.line < job.line and _overlap(o.writes, job.reads) for o in jobs)
        if job.recipe.chooses_ridge:
            # theirs are twice as many, perhaps of other segments
            values["held_out"] = True
        text = json.dumps([job.reads, edition, values])
        found[job.line] = sha256(text.encode()).hexdigest()[:16]
    return found


def _members(
    jobs: Sequence[BatchJob], groups: Mapping[int, str | None], group: str
) -> list[BatchJob]:
    return [job for job in jobs if groups[job.line] == group]


def _parse(
    number: int, text: str, defaults: Mapping[str, Any], preset: str | None, overwrite: bool
) -> BatchJob:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"must be a JSON object, not {type(data).__name__}")
    known = {*OWN_KEYS, *(field.name for field in fields(Recipe)), "version"}
    if unknown := sorted(set(data) - known):
        raise InputError(f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := [key for key in ("source", "out") if key not in data]:
        raise InputError(f"{' and '.join(missing)} missing; every job needs source and out")
    own = {key: data.pop(key) for key in OWN_KEYS if key in data}
    for key, value in own.items():
        if not isinstance(value, OWN_KEYS[key]) or value == "":
            raise InputError(f"{key} {json.dumps(value)}: must be a {OWN_KEYS[key].__name__}")
    # no shell has seen these
    source, out = (os.path.expanduser(own[key]) for key in ("source", "out"))
    start = own.get("preset", preset)
    given = {**defaults, **data}
    under = {} if start is None else fields_for(start, source, given)
    recipe = Recipe.from_json({**under, **given})
    if recipe.calibration is None:
        raise InputError("calibration is missing; give it in the line or as --calibration")
    refuse_missing_path(recipe.calibration)
    if recipe.latency is not None:
        LatencyTable.read(recipe.latency)
    name = own.get("name", os.path.basename(os.path.abspath(out)))
    return BatchJob(number, name, source, out, recipe, own.get("overwrite", overwrite))


def _checked(
    job: BatchJob,
    before: Sequence[BatchJob],
    after: Sequence[BatchJob],
    resume: bool,
    look: Callable[[BatchJob], None] | None,
) -> BatchJob:
    """The job with `finished`; InputError if its source or out cannot be what they are."""
    for other in before:
        if _overlap(other.writes, job.writes):
            raise InputError(f"out {job.out}: is or overlaps the out of line {other.line}")
    makers = [other for other in before if job.reads_from(other)]
    local = bool(makers) or _is_path(job.source)
    if not makers and not os.path.isdir(job.source):
        if later := [other.line for other in after if _within(job.reads, other.writes)]:
            raise InputError(f"source {job.source}: is made by line {later[0]}; put that one first")
        if local:
            raise InputError(f"source {job.source}: no such folder")
    if resume and _finished(job) and all(maker.finished for maker in makers):
        return replace(job, finished=True)
    check_output(Path(job.out), Path(job.reads) if local else None, overwrite=job.overwrite)
    if job.unfinished and not (job.overwrite or resume):
        raise InputError(f"out {job.out}: an unfinished run is there; give --resume or --overwrite")
    # what another job is to write is not there, or not that
    if look is not None and all(maker.finished for maker in makers):
        look(job)
    return job


def _finished(job: BatchJob) -> bool:
    try:
        report = Report.read(job.out)
    except InputError:
        return False
    same = report.source == job.source or os.path.realpath(report.source) == job.reads
    table = None if job.recipe.latency is None else LatencyTable.read(job.recipe.latency).sha256
    same = same and report.latency.get("sha256") == table
    return same and report.recipe == job.recipe.to_json()


def _is_path(source: str) -> bool:
    """Not a hub id, as `checkpoint.load.resolve` tells them apart."""
    return os.path.exists(source) or source.startswith((".", "/")) or source.count("/") != 1


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def _overlap(one: str, other: str) -> bool:
    return _within(one, other) or _within(other, one)


def _narrowness(job: BatchJob) -> tuple[int, int, int]:
    """Smallest for the job with the most Sites; among equals the earlier line."""
    layers = job.recipe.layers
    span = sys.maxsize if layers is None else layers[1] - layers[0]
    return -len(job.recipe.target), -span, job.line

"""The hidden folder beside the output in which a compression works until it is complete.

    .OUT.job/lock             held while a process works on it
    .OUT.job/journal.json     how far it is (`journal`)
    .OUT.job/output/          what becomes OUT, by one rename
    .OUT.job/hidden-*/        hidden states that a later run goes on from
    .OUT.job/*.safetensors    what was computed once, before the layers
    .OUT.job/levels/          of a search, until it is over
    .OUT.job/liar_search.jsonl    what it has tried
    .OUT.job/scratch/         what only the running process needs
    .OUT.job/replaced/        what was OUT, between the two renames that replace it

Nothing is under the output's name before it is complete. What an interrupted run leaves stays if
its journal has an entry, for `--resume`; otherwise it is removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from liar_ext.checkpoint.journal import Journal, sync_path, sync_tree
from liar_ext.checkpoint.writer import check_output, usual_permissions, writing
from liar_ext.errors import InputError, Interrupted, LiarError


@dataclass(frozen=True)
class Job:
    """Attributes: `folder` and what is in it; `out`, where the output goes."""

    folder: Path
    out: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / "journal.json")

    @property
    def replaced(self) -> Path:
        return self.folder / "replaced"

    @property
    def unfinished(self) -> bool:
        """Whether there is something to go on with; without an output it has its name already."""
        return self.journal.path.exists() and self.output.exists()

    def complete(self) -> None:
        """Give the output its name; what had it before is removed with the job's folder.

        Raises:
            InputError: it cannot be renamed; what had the name has it again.
        """
        usual_permissions(self.output)
        sync_tree(self.output)
        try:
            if self.out.exists():
                self.out.rename(self.replaced)
            self.output.rename(self.out)
            sync_path(self.out.parent)
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be renamed ({error.strerror})") from error
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Undo the first of the two renames if the second one did not happen."""
        if self.replaced.exists() and not self.out.exists():
            self.replaced.rename(self.out)


def job_folder(out: Path) -> Path:
    """Where the compression into `out` works."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.job"


@contextmanager
def open_job(
    out: Path, source: Path | None, *, overwrite: bool = False, resume: bool = False
) -> Iterator[Job]:
    """The job folder of `out`, made or found again; its output is renamed to `out` by `complete`.

    Args:
        resume: go on with what an interrupted run left, if there is anything.
        overwrite: replace `out`; without `resume`, start again where an unfinished run is.
    Raises:
        InputError: `out` cannot be written, another process is at it, or an unfinished run is
            there and neither flag says what to do with it. What goes wrong after a journal entry
            says that `--resume` goes on.
        Interrupted: by Ctrl-C or a signal, after a journal entry.
    """
    check_output(out, source, overwrite=overwrite or resume)
    out = Path(os.path.abspath(out))
    job = Job(job_folder(out), out)
    made = [p for p in out.parents if not p.exists()]
    try:
        lock = _locked(job)
    except OSError as error:
        with suppress(OSError):
            for folder in (job.folder, *made):
                folder.rmdir()
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    # until it is known that it is of no use
    keep = True
    try:
        with writing(out, job.folder):
            job.put_back()
            keep = job.unfinished
            if keep and not overwrite:
                _check_flags(job, resume=resume)
            check_output(out, source, overwrite=overwrite)
            keep = keep and resume
            if not keep:
                _empty(job.folder)
            shutil.rmtree(job.scratch, ignore_errors=True)
            job.scratch.mkdir()
            job.output.mkdir(exist_ok=True)
            yield job
            keep = False
    except BaseException as error:
        # what has its name already is complete, whatever came after
        keep = job.unfinished
        if keep:
            _say_what_is_kept(job, error)
        raise
    finally:
        if keep:
            shutil.rmtree(job.scratch, ignore_errors=True)
        else:
            _remove(job.folder)
        os.close(lock)
        if not out.exists() and not keep:
            # somebody else may have put something there; that must not hide the first error
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()


def clear_finished(out: Path) -> None:
    """Remove the folder of a job that was killed after its output had its name."""
    job = Job(job_folder(out), Path(os.path.abspath(out)))
    if job.folder.exists():
        lock = _locked(job)
        _remove(job.folder)
        os.close(lock)


def _check_flags(job: Job, *, resume: bool) -> None:
    """Raise InputError unless it is clear what to do with an unfinished run."""
    there = f"an unfinished run is in {job.folder} ({job.journal.progress()})"
    if not resume:
        goes_on = "" if job.journal.damaged() else "--resume goes on with it, "
        raise InputError(f"--out {job.out}: {there}; {goes_on}--overwrite starts again")
    if job.out.exists():
        raise InputError(
            f"--out {job.out}: exists, and {there}; --resume --overwrite goes on with it and "
            "replaces what exists"
        )


def _locked(job: Job) -> int:
    """The job's lock; its folder is made if missing.

    Raises:
        InputError: another process holds it.
    """
    path = job.folder / "lock"
    while True:
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # a process that ends has just removed the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the file of a process that ended meanwhile is not the one that others lock
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                f"--out {job.out}: another process is writing it (it holds {path})"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _say_what_is_kept(job: Job, error: BaseException) -> None:
    """Add it to the message; an interrupt has none of its own yet."""
    progress = job.journal.progress()
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(
            f"interrupted after {progress}; --resume goes on, and deleting {job.folder} gives up"
        ) from error
    kept = f"{progress} are kept, --resume goes on from there"
    if not isinstance(error, LiarError):
        error.add_note(kept)
    # those that refuse to resume say what to do instead
    elif "--resume" not in str(error):
        error.args = (f"{error}; {kept}",)


def _empty(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove all but the lock; the journal first: what it names has to be there while it is."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "journal.json"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        elif path.name != "lock":
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove the folder. The lock goes last: from then on another process may begin."""
    with suppress(OSError):
        _empty(folder, ignore_errors=True)
        (folder / "lock").unlink()
        folder.rmdir()

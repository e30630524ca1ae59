"""Runs compressions one after another, each in a process of its own.

A segmentation fault or the out-of-memory killer ends one job, and the others go on. Jobs on the
dense path (`statistics` oneshot) of one checkpoint and calibration share a folder of Moments: the
first computes them, the others need no forward pass.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from liar_ext.engine.moments_store import MomentsStore
from liar_ext.errors import InputError
from liar_ext.jobs import BatchJob, group_keys, ordered
from liar_ext.report.schema import Report
from liar_ext.report.text import time_left

# -P: the working folder is no place to import from; a `kernels` there would hide the PyPI package
COMMAND = (sys.executable, "-P", "-m", "liar_ext")
# what a process leaves behind may take this long to end by itself
GRACE_SECONDS = 5.0
# statuses after which --resume has something to do that was not tried to the end
OPEN = ("not run", "interrupted")


@dataclass
class Outcome:
    """What became of a job.

    Attributes:
        status: `done`, `skipped` (was done before), `failed`, `interrupted` or `not run`.
        error: one line; totals: of the report.
    """

    job: BatchJob
    status: str = "not run"
    seconds: float = 0.0
    error: str | None = None
    totals: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        job = self.job
        where = {"name": job.name, "line": job.line, "source": job.source, "out": job.out}
        rest = {"seconds": self.seconds, "error": self.error, "totals": self.totals}
        return {**where, "status": self.status, **rest}


class Queue:
    """Runs jobs one after another; what happens to one does not touch the others.

    Args:
        moments: folder under which groups keep their Moments; each group's is deleted when all its
            jobs have been run, unless `keep_moments`.
        resume: skip jobs that are finished, go on with unfinished runs.
        options: more options of every job.
        command: what `prune SRC --out OUT --recipe FILE --json ...` is appended to.
        say: takes each line for the user.
    Attributes:
        interrupted: SIGINT, SIGTERM or SIGHUP came: no further job was started.
    """

    def __init__(
        self,
        jobs: Sequence[BatchJob],
        *,
        moments: Path,
        keep_moments: bool = False,
        resume: bool = False,
        stop_on_error: bool = False,
        options: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._outcomes = {job.line: Outcome(job) for job in ordered(jobs)}
        self._groups = group_keys(jobs)
        self._moments, self._keep = moments, keep_moments
        self._resume, self._stop = resume, stop_on_error
        self._command, self._options = tuple(command), tuple(options)
        self._say = say or _to_stderr
        self._child: subprocess.Popen[bytes] | None = None
        self._told = False
        self.interrupted = False

    def run(self) -> list[Outcome]:
        """All outcomes, in the order of the jobs file."""
        with self._signals(), tempfile.TemporaryDirectory(prefix="liar-batch-") as recipes:
            begun = time.perf_counter()
            for place, outcome in enumerate(self._outcomes.values(), 1):
                if self.interrupted:
                    break
                started = time.perf_counter()
                try:
                    self._settle(outcome, Path(recipes))
                except (OSError, InputError) as error:
                    outcome.status, outcome.error = "failed", str(error)
                if outcome.status not in ("skipped", "not run"):
                    outcome.seconds = time.perf_counter() - started
                if outcome.error is not None:
                    self._tell(f"[{outcome.job.name}] {outcome.status}: {outcome.error}")
                self._tidy(self._groups[outcome.job.line])
                jobs = len(self._outcomes)
                left = time_left(place, jobs, time.perf_counter() - begun)
                self._tell(f"{place} of {jobs} jobs{left}")
                if outcome.status == "failed" and self._stop:
                    break
        if self._moments.is_dir():
            if not any(self._moments.iterdir()):
                self._moments.rmdir()
            elif any(o.status in OPEN for o in self._outcomes.values()):
                self._tell(f"Moments are kept in {self._moments} for --resume; delete it if not")
        return sorted(self._outcomes.values(), key=lambda outcome: outcome.job.line)

    def _settle(self, outcome: Outcome, recipes: Path) -> None:
        """Run a job or find that it need not or cannot be run."""
        job = outcome.job
        origin = self._origin(job)
        if origin is not None and origin.status not in ("done", "skipped"):
            outcome.status = "failed"
            outcome.error = f"its source is the output of {origin.job.name}, which is not done"
            return
        if job.finished:
            outcome.status, outcome.totals = "skipped", Report.read(job.out).totals
            return
        recipe = recipes / f"{job.line}.json"
        recipe.write_text(json.dumps(job.recipe.to_json()), encoding="utf-8")
        # an unfinished run goes on; what it replaces, if anything, is replaced at its end
        resume = self._resume and job.unfinished
        overwrite = job.overwrite and (not resume or os.path.exists(job.out))
        arguments = [*self._command, "prune", job.source, "--out", job.out]
        arguments += ["--recipe", str(recipe), "--json", *self._options]
        arguments += ["--resume"] * resume + ["--overwrite"] * overwrite
        self._spawn([*arguments, *self._sharing(job)], outcome)

    def _origin(self, job: BatchJob) -> Outcome | None:
        """The last job before this one that writes what it reads."""
        writers = [o for o in self._outcomes.values() if job.reads_from(o.job)]
        return max(writers, key=lambda outcome: outcome.job.line, default=None)

    def _sharing(self, job: BatchJob) -> list[str]:
        """The option with the folder of its group, if there is anybody to share with."""
        group = self._groups[job.line]
        if group is None:
            return []
        folder = self._moments / group
        left = [
            o.job
            for o in self._outcomes.values()
            if self._groups[o.job.line] == group and o.status == "not run" and not o.job.finished
        ]
        if len(left) < 2 and not self._keep and not folder.exists():
            return []
        # the first job computes what the others need in its forward pass
        MomentsStore.ask(folder, [(o.recipe.target, o.recipe.layers) for o in left])
        return ["--moments", str(folder)]

    def _tidy(self, group: str | None) -> None:
        """Delete the Moments of a group of which no job is left."""
        if group is None or self._keep:
            return
        members = [o for o in self._outcomes.values() if self._groups[o.job.line] == group]
        if not any(outcome.status in OPEN for outcome in members):
            try:
                MomentsStore.delete(self._moments / group)
            except OSError as error:
                self._tell(f"{self._moments / group}: cannot be deleted ({error.strerror})")

    def _spawn(self, arguments: Sequence[str], outcome: Outcome) -> None:
        """Run a process to its end, passing on what it says, and read what it did."""
        with tempfile.TemporaryFile() as printed:
            child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.PIPE,
                # Ctrl-C of a terminal reaches this process only, which passes it on once: a second
                # one would break into the cleaning up
                process_group=0,
            )
            self._child = child
            if self.interrupted:
                self._pass_on()
            heard: list[str] = []
            ears = threading.Thread(target=self._listen, args=(child.stderr, outcome, heard))
            ears.daemon = True
            ears.start()
            # not reaped yet, so that its number cannot be anybody else's
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            ears.join(GRACE_SECONDS)
            self._kill()  # workers that outlive a crash
            self._child = None
            code = child.wait()
            ears.join(GRACE_SECONDS)
            if child.stderr is not None and not ears.is_alive():
                child.stderr.close()
            printed.seek(0)
            lines = printed.read().decode(errors="replace").strip().splitlines()
        if code == 0:
            try:
                outcome.totals = json.loads(lines[-1])["totals"]
                outcome.status = "done"
            except (ValueError, KeyError, TypeError, IndexError):
                outcome.status = "failed"
                outcome.error = "ended well but printed no report as JSON"
            return
        outcome.status = "interrupted" if self.interrupted else "failed"
        outcome.error = _reason(code, heard)

    def _listen(self, stream: IO[bytes], outcome: Outcome, heard: list[str]) -> None:
        """Pass on a stream to its end; the last lines stay in `heard`."""
        for raw in stream:
            text = raw.decode(errors="replace").rstrip()
            heard.append(text)
            del heard[:-50]
            self._tell(f"[{outcome.job.name}] {text}")

    def _tell(self, text: str) -> None:
        # a closed terminal is no reason to stop, or to leave a child with a full pipe
        with suppress(OSError, ValueError):
            self._say(text)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While jobs run, signals are passed on; the second one kills."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # ignored in a shell's background stays ignored
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        again, self.interrupted = self.interrupted, True
        if again:
            self._kill()
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        """Once for each child: another signal would break into its cleaning up."""
        if self._child is not None and not self._told:
            self._told = True
            self._child.terminate()

    def _kill(self) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)


def _reason(code: int, heard: Sequence[str]) -> str:
    """Why a process ended badly, in one line."""
    if code < 0:
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return f"killed by signal {-code} ({signal.strsignal(-code)}){hint}"
    errors = [text for text in heard if text.startswith("error: ")]
    last = next((text for text in reversed(heard) if text.strip()), "no message")
    return errors[-1].removeprefix("error: ") if errors else f"exit status {code}: {last}"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""Command lines one after another in the ranks of one torchrun launch, with faults on demand.

As a script: `liar_torchrun.py FOLDER`, with or without torchrun's environment. It runs the commands
of FOLDER/commands.json through `liar_ext.cli.main`; rank r leaves what each one said and returned
in FOLDER/r.json. One launch serves many checks, because starting costs seconds. The processes' own
output is in FOLDER/log: what is in it was printed past the command line, by C++ or a traceback.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# for launches that take seconds alone, on a machine that others use
LIMIT_SECONDS = 300.0
# tokens of a segment: a quarter of what it is elsewhere, so that a quarter of the tokens will do
SEGMENT = 1024
# loopback only, and one thread a rank as torchrun sets it
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Command:
    """Attributes:

    arguments: of `liar`; more: further ones for some ranks.
    fault: what goes wrong in it, a key of `FAULTS`.
    """

    arguments: Sequence[str]
    more: dict[str, Sequence[str]] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Told:
    """What a command line returned and printed on one rank, and how long it took."""

    code: int
    out: str
    error: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines of standard error that are no progress."""
        return [line for line in self.error.splitlines() if not line.startswith("layer ")]


def torchrun(size: int, folder: Path, *arguments: str) -> list[str]:
    """The command that starts `size` ranks whose output goes to `folder`/log."""
    start = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    start += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(size)]
    return [*start, "--redirects", "3", "--log-dir", str(folder / "log"), *arguments]


def start(size: int, folder: Path, commands: Sequence[Command]) -> subprocess.Popen[bytes]:
    """The launch; 1 is a process of its own without torchrun."""
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps([asdict(command) for command in commands]))
    script = [__file__, str(folder)]
    line = [sys.executable, "-P", *script] if size == 1 else torchrun(size, folder, *script)
    # not from the repository: `kernels/` there hides a package that transformers looks for
    with open(folder / "agent", "wb") as output:
        return subprocess.Popen(
            line,
            env=os.environ | ENVIRONMENT,
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def launch(size: int, folder: Path, commands: Sequence[Command]) -> list[list[Told]]:
    """What every rank was told, by rank and command; a killed one until then."""
    process = start(size, folder, commands)
    try:
        process.wait(LIMIT_SECONDS)
    finally:
        process.terminate()
        process.wait()
    return told(size, folder)


def told(size: int, folder: Path) -> list[list[Told]]:
    return [
        [Told(**entry) for entry in json.loads((folder / f"{rank}.json").read_text())]
        for rank in range(size)
    ]


def beside(folder: Path) -> str:
    """All that the ranks printed past their command lines."""
    logs = sorted((folder / "log").rglob("std*.log"))
    return "".join(path.read_text() for path in logs)


# faults: called in each rank with the command's arguments; they undo themselves


@contextmanager
def _unreadable(arguments: Sequence[str], *, at_once: bool = False) -> Iterator[None]:
    """On rank 1 the last shard cannot be opened any more once the journal has an entry.

    Or, `at_once`, from when there is a job folder on.
    """
    job = _job(arguments)
    when = job if at_once else job / "journal.json"
    real = os.open

    def open_(path: Any, *rest: Any, **options: Any) -> int:
        if "model-00003-of-00003" in str(path) and when.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *rest, **options)

    if os.environ.get("RANK") == "1":
        os.open = open_
    try:
        yield
    finally:
        os.open = real


@contextmanager
def _at_layer_2(act: Callable[[], None]) -> Iterator[None]:
    from liar_ext.checkpoint.store import CheckpointStore

    real = CheckpointStore.open

    def open_(self: Any, index: int) -> None:
        if index == 2:
            act()
        real(self, index)

    CheckpointStore.open = open_  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointStore.open = real  # type: ignore[method-assign]


@contextmanager
def _killed(arguments: Sequence[str]) -> Iterator[None]:
    """Rank 1 is killed in layer 2; the others stay in it until they hear of it."""

    def act() -> None:
        if os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with _at_layer_2(act):
        yield


@contextmanager
def _paused(arguments: Sequence[str]) -> Iterator[None]:
    """All ranks stay in layer 2, and say so by a file, until they are interrupted."""

    def act() -> None:
        (Path(sys.argv[1]) / f"paused-{os.environ.get('RANK', 0)}").touch()
        time.sleep(LIMIT_SECONDS)

    with _at_layer_2(act):
        yield


FAULTS = {
    "unreadable": _unreadable,
    "unreadable-at-once": partial(_unreadable, at_once=True),
    "killed": _killed,
    "paused": _paused,
}


def _job(arguments: Sequence[str]) -> Path:
    from liar_ext.checkpoint.job import job_folder

    return job_folder(Path(arguments[list(arguments).index("--out") + 1]))


def main() -> int:
    from liar_ext.cli import main as liar
    from liar_ext.engine import statistics

    statistics.CHUNK_TOKENS = SEGMENT
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    seen: list[dict[str, Any]] = []
    code = 0
    (folder / f"{rank}.json").write_text("[]")
    for entry in json.loads((folder / "commands.json").read_text()):
        arguments = [*entry["arguments"], *entry["more"].get(rank, ())]
        fault = FAULTS[entry["fault"]](arguments) if entry["fault"] else nullcontext()
        started = time.monotonic()
        with (
            fault,
            redirect_stdout(io.StringIO()) as out,
            redirect_stderr(io.StringIO()) as error,
        ):
            code = liar(arguments)
        seconds = time.monotonic() - started
        seen.append(asdict(Told(code, out.getvalue(), error.getvalue(), seconds)))
        (folder / f"{rank}.json").write_text(json.dumps(seen))
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Compressions in processes of their own that are killed: at a named point, or at any moment.

A fork server imports liar_ext once (seconds); a process forked from it starts in a tenth of a
second. `kill -9` is what is tested, so nothing here cleans up after a process.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from liar_families import FAMILIES, randomise, write_tokens
from transformers import LlamaForCausalLM

from liar_ext import Recipe
from liar_ext.checkpoint.job import Job, job_folder
from liar_ext.engine.execution import Execution

CONTEXT = multiprocessing.get_context("forkserver")
# for a compression that takes a second alone, on a machine that others use
LIMIT_SECONDS = 120.0
LAYERS = 4
EAGER = Execution(hidden_states="device", journal_seconds=0)
# what differs between two runs of the same work
TRANSIENT = ("seconds", "run")


@dataclass(frozen=True)
class Point:
    """Where a process kills itself.

    Attributes:
        place: `module:name` or `module:Class.name` of a function.
        when: `before`, `after` or `half`: in the middle of writing its bytes.
        which: argument that has to contain a text, as (position, text); None for any call.
    """

    place: str
    when: str
    which: tuple[int, str] | None = None


POINTS = {
    "journal not begun": Point("liar_ext.engine.keeper:Keeper.keep", "before"),
    "journal written": Point("liar_ext.engine.keeper:Keeper.keep", "after"),
    "journal half written": Point("liar_ext.checkpoint.journal:Journal.write", "half"),
    "hidden states not named": Point("liar_ext.checkpoint.journal:Journal.write", "before"),
    "old hidden states still there": Point("liar_ext.checkpoint.journal:Journal.write", "after"),
    "hidden states half written": Point("liar_ext.engine.shelf:write_bytes", "half"),
    "tensor half written": Point("liar_ext.checkpoint.shards:ShardWriter._write", "half"),
    "layer computed": Point("liar_ext.checkpoint.store:CheckpointStore.close", "before"),
    "layer being written": Point("liar_ext.checkpoint.store:CheckpointStore.close", "after"),
    "shards made": Point("liar_ext.checkpoint.store:CheckpointStore.prepare", "after"),
    "site half pruned": Point("liar_ext.engine.repair:Repairer.repair", "after"),
    "moments being saved": Point("liar_ext.engine.moments_store:MomentsStore.save", "after"),
    "levels not named": Point("liar_ext.engine.level_store:sync_path", "before", (0, ".tmp")),
    "levels being saved": Point("liar_ext.engine.level_store:FiledLevels.save", "after"),
    "candidates compared": Point("liar_ext.engine.oracle:ModelOracle._compared", "after"),
    "answers written": Point("liar_ext.engine.ledger:SearchLedger.add", "after"),
    "search over": Point("liar_ext.engine.keeper:Keeper.put_aside", "after", (1, "search")),
    "levels still there": Point("liar_ext.engine.level_store:FiledLevels.discard", "before"),
    "levels gone": Point("liar_ext.engine.level_store:FiledLevels.discard", "after"),
    "layers chosen": Point("liar_ext.engine.compress:sync_path", "after"),
    "shards complete": Point("liar_ext.checkpoint.store:CheckpointStore.finish", "after"),
    "other files copied": Point("liar_ext.engine.compress:copy_other_files", "after"),
    "records written": Point("liar_ext.engine.compress:write_records", "after"),
    "not renamed": Point("pathlib:Path.rename", "before", (0, ".job/output")),
    "old output moved": Point("pathlib:Path.rename", "after", (1, ".job/replaced")),
    "renamed": Point("pathlib:Path.rename", "after", (0, ".job/output")),
}


@dataclass(frozen=True)
class Work:
    """One compression: the arguments of `liar_ext.compress`, and threads of the process."""

    source: Path
    out: Path
    recipe: Recipe
    execution: Execution = EAGER
    overwrite: bool = False
    threads: int = 1

    @property
    def job(self) -> Job:
        return Job(job_folder(self.out), self.out)

    def resumed(self) -> Work:
        return replace(self, execution=replace(self.execution, resume=True))


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        killed: by a signal that nobody handled.
        error: type and text of what was raised; code, told: of a command line.
        seconds: from the first line of the work to its end.
        journal: what the journal says at the end, None without one.
    """

    killed: bool
    seconds: float
    journal: str | None
    error: tuple[str, str] | None = None
    code: int | None = None
    told: str = ""

    @property
    def done(self) -> bool:
        return not self.killed and self.error is None and not self.code

    @property
    def error_line(self) -> str:
        """The last line of a command's standard error."""
        return self.told.rstrip("\n").rpartition("\n")[2]


def make_source(folder: Path, *, shard: str = "1GB") -> Path:
    """A small LLaMA of random weights with `LAYERS` layers, and a file that is copied."""
    config = FAMILIES["llama-mha"].build().config
    config.num_hidden_layers = LAYERS
    randomise(LlamaForCausalLM(config)).save_pretrained(folder, max_shard_size=shard)
    (folder / "LICENSE").write_text("as you like\n" * 1000)
    return folder


def compress(work: Work, *, at: str | None = None, nth: int = 1, after: float | None = None) -> End:
    """Run `work`, killed at the `nth` time it comes to a point or `after` so many seconds."""
    return _run(_compress, (work, None if at is None else POINTS[at], nth), work.job, after)


def command(
    arguments: Sequence[str],
    out: Path,
    setup: Callable[[], None] | None = None,
    *,
    after: float | None = None,
    number: signal.Signals = signal.SIGTERM,
) -> End:
    """Run the command line in a process; `setup` is called there before.

    Args:
        after: seconds until the process gets a signal, `number`.
    """
    job = Job(job_folder(out), out)
    return _run(_command, (list(arguments), setup), job, after, number)


def resume(work: Work) -> End:
    """Go on until it is done; whatever stops it but a kill is an error of the test."""
    end = compress(work.resumed())
    assert end.done, end
    return end


@dataclass(frozen=True)
class Bench:
    """A model and calibration tokens in `root`, and results without a break, by recipe."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "dense"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens.npy"

    @classmethod
    def make(cls, root: Path) -> Bench:
        make_source(root / "dense")
        write_tokens(root / "tokens.npy")
        return cls(root)

    def recipe(self, **changes: Any) -> Recipe:
        values = {"calibration": str(self.tokens), "seq_len": 24, "samples": 24, "sparsity": 0.5}
        return Recipe(**{**values, "target": ("ffn", "heads"), **changes})

    def whole(self, recipe: Recipe) -> Path:
        """The result without a break."""
        folder = self.root / str(abs(hash(recipe)))
        if not folder.exists():
            assert compress(Work(self.source, folder, recipe)).done
        return folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output but for what differs between two runs of the same work."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    report = json.loads(found["liar_report.json"])
    for part in (report, *report["sites"]):
        for name in TRANSIENT:
            part.pop(name, None)
    return found | {"liar_report.json": report}


def differences(one: Path, other: Path) -> list[str]:
    """The names of files that are not the same, and what else is beside the second output."""
    first, second = contents(one), contents(other)
    found = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return found + [path.name for path in other.parent.glob(f".{other.name}.*")]


def _run(
    target: Callable[..., None],
    given: tuple[Any, ...],
    job: Job,
    after: float | None,
    number: signal.Signals = signal.SIGKILL,
) -> End:
    CONTEXT.set_forkserver_preload(["liar_ext.engine.compress", "liar_ext.engine.moments_store"])
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(sender, target, given), daemon=True)
    process.start()
    sender.close()
    with receiver:
        assert _next(receiver) == "begun"
        started = time.monotonic()
        process.join(LIMIT_SECONDS if after is None else after)
        if process.is_alive() and process.pid is not None:
            assert after is not None, f"no end in {LIMIT_SECONDS} seconds"
            os.kill(process.pid, number)
            process.join(LIMIT_SECONDS)
        told = _next(receiver) or {}
    assert process.exitcode in (0, -signal.SIGKILL, -number), f"exit code {process.exitcode}"
    killed = process.exitcode != 0 and not told
    journal = job.journal.progress() if job.journal.path.exists() else None
    return End(killed, time.monotonic() - started, journal, **told)


def _next(receiver: Connection) -> Any:
    try:
        return receiver.recv() if receiver.poll(LIMIT_SECONDS) else None
    except EOFError:
        return None


def _child(sender: Connection, target: Callable[..., None], given: tuple[Any, ...]) -> None:
    sender.send("begun")
    target(sender, *given)


def _compress(sender: Connection, work: Work, point: Point | None, nth: int) -> None:
    import torch

    import liar_ext

    torch.set_num_threads(work.threads)
    if point is not None:
        _kill_at(point, nth)
    error = None
    try:
        liar_ext.compress(
            work.source,
            work.out,
            work.recipe,
            overwrite=work.overwrite,
            execution=work.execution,
        )
    except BaseException as caught:
        error = type(caught).__name__, str(caught)
    sender.send({"error": error})


def _command(sender: Connection, arguments: list[str], setup: Callable[[], None] | None) -> None:
    from liar_ext.cli import main

    # a shell that starts tests in the background leaves SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if setup is not None:
        setup()
    with redirect_stderr(io.StringIO()) as told, redirect_stdout(io.StringIO()):
        code = main(arguments)
    sender.send({"code": code, "told": told.getvalue()})


def at_call(place: str, nth: int, act: Callable[[], None]) -> None:
    """Do something before the `nth` call of a function, in this process from now on."""
    owner, name, real = _found(place)
    calls = 0

    def acting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, acting)


def _kill_at(point: Point, nth: int) -> None:
    owner, name, real = _found(point.place)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if point.which is None or point.which[1] in str(args[point.which[0]]):
            calls += 1
        else:
            return real(*args, **kwargs)
        if calls == nth:
            if point.when == "half":
                HALVES[name](real, *args)
            elif point.when == "after":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


def _half_entry(real: Callable[..., Any], journal: Any, entry: dict[str, Any]) -> None:
    text = json.dumps(entry)
    journal.path.with_suffix(".tmp").write_text(text[: len(text) // 2])


def _half_tensor(real: Callable[..., Any], path: Path, tensor: Any) -> None:
    real(path, tensor.flatten()[: tensor.numel() // 2])


def _half_write(
    real: Callable[..., Any], writer: Any, file: str, raw: memoryview, offset: int
) -> None:
    real(writer, file, raw[: len(raw) // 2], offset)


HALVES = {"write": _half_entry, "write_bytes": _half_tensor, "_write": _half_write}


def _found(place: str) -> tuple[Any, str, Callable[..., Any]]:
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)

"""What happens to the source, the disk or the process during a run: named, nothing half done."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from liar_families import tree_hash, write_tokens
from liar_kill import LAYERS, Work, at_call, command, compress, differences, make_source, resume

import liar_ext
from liar_ext import Recipe
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.cli import main
from liar_ext.engine.execution import Execution

FIRST, LAST = "model-00001-of-", f"model-0000{LAYERS}-of-"
KEPT = "are kept, --resume goes on from there"


@dataclass(frozen=True)
class Desk:
    """One compression as command and as call. Attributes: `root`, with `dense` and `tokens.npy`."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "dense"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def shard(self, start: str) -> Path:
        return next(self.source.glob(f"{start}*.safetensors"))

    def work(self, **execution: Any) -> Work:
        recipe = Recipe(
            sparsity=0.5, calibration=str(self.root / "tokens.npy"), seq_len=24, samples=24
        )
        return Work(self.source, self.out, recipe, Execution(**{"journal_seconds": 0, **execution}))

    def arguments(self, *options: str) -> list[str]:
        given = ["prune", str(self.source), "--out", str(self.out), "--sparsity", "0.5"]
        given += ["--calibration", str(self.root / "tokens.npy"), "--seq-len", "24"]
        return [*given, "--samples", "24", *options]

    def left(self) -> list[str]:
        """What a run left beside what it was given."""
        return sorted({path.name for path in self.root.iterdir()} - {"dense", "tokens.npy"})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """With the result of a run without a break in `whole`."""
    desk = Desk(tmp_path_factory.mktemp("integrity"))
    make_source(desk.source, shard="40KB")
    write_tokens(desk.root / "tokens.npy")
    assert compress(desk.work()).done
    desk.out.rename(desk.root / "whole")
    return desk


@pytest.fixture
def desk(original: Desk, tmp_path: Path) -> Desk:
    shutil.copytree(original.source, tmp_path / "dense")
    shutil.copy(original.root / "tokens.npy", tmp_path)
    return Desk(tmp_path)


def same_weights(original: Desk, desk: Desk) -> bool:
    """Whether the output's weights are those of a run without a break."""
    first, second = tree_hash(original.root / "whole"), tree_hash(desk.out)
    names = {name for name in first if name.startswith("model")}
    return bool(names) and all(first[name] == second.get(name) for name in names)


def failed(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line of error of a command that ends with `code`."""
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@contextmanager
def during(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], *, layer: int = 0
) -> Iterator[None]:
    """Something happens when a layer has been pruned."""
    real = CheckpointStore.close

    def close(self: CheckpointStore, index: int, *, final: bool) -> None:
        real(self, index, final=final)
        if index == layer:
            act()

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "close", close)
        yield


def test_the_report_has_the_sums_that_sha256sum_prints(original):
    report = liar_ext.Report.read(original.root / "whole")
    shards = sorted(original.source.glob("*.safetensors"))
    assert len(shards) >= LAYERS
    assert report.source_files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards
    }


OPENED: list[tuple[str, int]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append((os.fspath(arguments[0]), arguments[2]))


def test_the_source_is_only_opened_to_read(desk, monkeypatch):
    sys.addaudithook(_audit)  # for the life of the process: it does nothing outside this test
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", seen)
    before = tree_hash(desk.source)
    # the time of the last change of anything about a file cannot be set back
    stamps = {path: path.stat().st_ctime_ns for path in (desk.source, *desk.source.iterdir())}
    work = desk.work()
    liar_ext.compress(work.source, work.out, work.recipe, execution=work.execution)
    mine = [(path, flags) for path, flags in seen if Path(path).is_relative_to(desk.source)]
    assert {Path(path).name for path, _ in mine} >= {p.name for p in desk.source.glob("model-*")}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    assert [path for path, flags in mine if flags & writing] == []
    assert tree_hash(desk.source) == before
    now = {path: path.stat().st_ctime_ns for path in (desk.source, *desk.source.iterdir())}
    assert now == stamps


def test_a_truncated_shard_is_named_before_any_work(desk, capsys):
    os.truncate(desk.shard(LAST), desk.shard(LAST).stat().st_size - 1)
    error = failed(capsys, desk.arguments())
    assert f"{desk.shard(LAST)}: truncated or corrupt" in error
    assert desk.left() == []


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _another_inode(path: Path) -> None:
    """The same bytes even, with the same times."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def _one_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


CHANGED = "was replaced or changed while it was being read; leave the checkpoint as it is during"


@pytest.mark.parametrize("start", [FIRST, LAST], ids=["read-already", "read-later"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, CHANGED),
        (_another_inode, CHANGED),
        (_one_bit, CHANGED),
        (Path.unlink, "was removed while it was being read; put the checkpoint back"),
    ],
    ids=["truncated", "replaced", "one-bit", "removed"],
)
def test_a_shard_that_changes_during_the_run_is_named(
    original, desk, monkeypatch, capsys, damage, says, start
):
    shard = desk.shard(start)
    with during(monkeypatch, lambda: damage(shard)):
        error = failed(capsys, desk.arguments("--journal-seconds", "3600"))
    assert error.startswith(f"{shard}: {says}")
    assert desk.left() == []
    shutil.copy(original.source / shard.name, shard)
    assert main(desk.arguments()) == 0
    assert same_weights(original, desk)


def test_permission_that_is_lost_during_the_run_is_named_and_it_goes_on_later(
    original, desk, monkeypatch, capsys
):
    # root may open everything, so that the kernel's refusal is played
    shard, real = str(desk.shard(LAST)), os.open
    lost = False

    def lose() -> None:
        nonlocal lost
        lost = True

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        if lost and os.fspath(path) == shard:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), shard)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    with during(monkeypatch, lose, layer=1):
        error = failed(capsys, desk.arguments("--journal-seconds", "0"))
    assert error.startswith(f"{shard}: permission denied; run as a user who may read it")
    assert error.endswith(f"; 1 of {LAYERS} layers pruned {KEPT}")
    assert desk.left() == [".out.job"]
    lost = False
    assert main(desk.arguments("--resume")) == 0
    assert same_weights(original, desk)
    assert desk.left() == ["out"]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of that size in `folder`; yields what makes it another size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")

    def resize(kilobytes: int) -> None:
        options = ["-o", f"remount,size={kilobytes}k"]
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_after_a_journal_entry_keeps_it(original, desk, monkeypatch, capsys):
    """Hidden states are 72 KiB; a second entry is written before the first is removed."""
    with small_disk(desk.root / "disk", 2000) as resize:
        out = desk.root / "disk" / "out"
        arguments = desk.arguments("--journal-seconds", "0", "--out", str(out))

        def fill() -> None:
            used = shutil.disk_usage(desk.root / "disk").used
            resize(used // 1024 + 40)

        with during(monkeypatch, fill, layer=1):
            error = failed(capsys, arguments)
        assert error == (
            f"--out {out}: writing failed (No space left on device); "
            f"1 of {LAYERS} layers pruned {KEPT}"
        )
        assert [path.name for path in out.parent.iterdir()] == [".out.job"]
        resize(2000)
        assert main([*arguments, "--resume"]) == 0
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.move(out, desk.out)
    assert same_weights(original, desk)


def test_a_disk_that_is_full_at_once_leaves_nothing(desk, capsys):
    with small_disk(desk.root / "disk", 40):
        out = desk.root / "disk" / "a" / "out"
        error = failed(capsys, desk.arguments("--journal-seconds", "0", "--out", str(out)))
        assert error == f"--out {out}: writing failed (No space left on device)"
        assert list((desk.root / "disk").iterdir()) == []


def test_a_full_scratch_folder_names_its_option_and_the_way_out(desk, capsys):
    with small_disk(desk.root / "disk", 40):
        scratch = str(desk.root / "disk")
        error = failed(capsys, desk.arguments("--hidden-states", "disk", "--scratch", scratch))
        assert error == (
            f"--scratch {scratch}: hidden states cannot wait there (No space left on device); give "
            "a --scratch with more room, or --hidden-states device, which keeps them in memory"
        )
        assert list((desk.root / "disk").iterdir()) == []
    assert desk.left() == ["disk"]


def test_an_output_folder_that_may_not_be_written_any_more(desk, monkeypatch, capsys):
    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def lose() -> None:
        monkeypatch.setattr(os, "pwrite", refuse)

    with during(monkeypatch, lose, layer=1):
        error = failed(capsys, desk.arguments("--journal-seconds", "0"))
    assert error.startswith(f"--out {desk.out}: writing failed (Read-only file system); ")
    assert error.endswith(KEPT)
    monkeypatch.undo()
    assert main(desk.arguments("--resume")) == 0
    assert desk.left() == ["out"]


# --- signals ------------------------------------------------------------------------------------

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def at_layer(number: signal.Signals, layer: int) -> Callable[[], None]:
    """In the process of the command: the signal comes when it begins with a layer."""
    place = "liar_ext.checkpoint.store:CheckpointStore.open"
    return partial(at_call, place, layer + 1, partial(signal.raise_signal, number))


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_before_the_first_journal_entry_leaves_nothing(desk, number):
    arguments = desk.arguments("--journal-seconds", "3600")
    end = command(arguments, desk.out, at_layer(number, 2))
    assert (end.code, end.error_line) == (2, "error: interrupted; nothing was written")
    assert desk.left() == []


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_after_a_journal_entry_keeps_it_and_says_so(original, desk, number):
    arguments = desk.arguments("--journal-seconds", "0")
    end = command(arguments, desk.out, at_layer(number, 3))
    assert end.code == 2
    assert end.error_line == (
        f"error: interrupted after 3 of {LAYERS} layers pruned; --resume goes on, and deleting "
        f"{desk.root}/.out.job gives up"
    )
    assert desk.left() == [".out.job"]
    assert not (desk.root / ".out.job" / "scratch").exists()
    resume(desk.work())
    assert same_weights(original, desk)
    assert desk.left() == ["out"]


def test_a_resumed_run_that_is_interrupted_keeps_what_it_had(desk):
    assert compress(desk.work(), at="journal written", nth=2).killed
    arguments = desk.arguments("--journal-seconds", "3600", "--resume")
    end = command(arguments, desk.out, at_layer(signal.SIGTERM, 1))
    assert end.error_line.startswith("error: interrupted after 2 of")
    whole = desk.work()
    resume(whole)
    desk.out.rename(desk.root / "resumed")
    assert compress(whole).done
    assert differences(desk.out, desk.root / "resumed") == []

"""Ledger: the folder of a comparison, and the cells that are finished.

DIR/grid.json        what every figure depends on; a run with another identity is refused
DIR/cells.jsonl      the dense model, then one line for each finished cell
DIR/moments/         Moments of the dense path, while cells share them
DIR/comparison.*     the result, when every cell was tried; DIR/plot-*.svg beside it
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.journal import check_identity, sync_path
from liar_ext.checkpoint.writer import check_output, writing
from liar_ext.errors import InputError

VERSION = 1
IDENTITY, CELLS, MOMENTS = "grid.json", "cells.jsonl", "moments"
# in that: of compressions that hold tokens out
HELD_OUT = "held-out"
RESULT, TABLES, PLOTS = "comparison.json", "comparison.md", "plot-*.svg"
_DENSE = "dense"


class Ledger:
    """What is finished, by key; every entry is on disk when `add` returns.

    Attributes:
        folder: that of the comparison; entries: one JSON object for each cell, the last of its key.
    Raises:
        InputError: a line is damaged. One that a killed process left half-written is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / CELLS
        self.entries: dict[str, dict[str, Any]] = {}
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self._path}: line {number} is damaged ({error}); remove the line, or start "
                    "again with --overwrite instead of --resume"
                ) from error
        if whole < len(data):
            os.truncate(self._path, whole)

    @property
    def dense(self) -> dict[str, Any] | None:
        """The dense model's figures, once they are known."""
        return self.entries.get(_DENSE)

    def add_dense(self, entry: dict[str, Any]) -> None:
        self.add({"key": _DENSE, **entry})

    def done(self, key: str) -> bool:
        """Whether a cell needs not be computed; one that failed is tried again."""
        return key in self.entries and self.entries[key]["status"] == "done"

    def add(self, entry: dict[str, Any]) -> None:
        """Append one entry: a kill leaves all of it, or a last line without an end."""
        line = json.dumps(entry, allow_nan=False) + "\n"
        new = not self._path.exists()
        with open(self._path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_path(self.folder)
        self.entries[entry["key"]] = entry


def check_folder(out: Path, source: Path | None, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError if a comparison may not be written to `out`; touches nothing."""
    if resume and overwrite:
        raise InputError("--resume goes on and --overwrite starts again: give one of them")
    if not (out / IDENTITY).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"--out {out}: holds other things than a comparison; give a new or empty folder"
            )
        check_output(out, source, overwrite=True)
        return
    if resume or overwrite:
        return
    what = "a comparison" if (out / RESULT).exists() else "an unfinished comparison"
    raise InputError(
        f"--out {out}: holds {what}; --resume goes on with it, --overwrite starts again"
    )


@contextmanager
def open_ledger(
    out: Path, source: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Ledger]:
    """The ledger of `out`, made or found again; no other process can open it meanwhile.

    What ends before there is an entry leaves nothing.

    Raises:
        InputError: as `check_folder`; another process works there; with `resume`, what is there
            was made from something else, which is named; writing failed.
    """
    check_folder(out, source, resume=resume, overwrite=overwrite)
    made = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another process is writing it") from error
        with writing(out, out):
            if overwrite:
                _clear(out)
            _claim(out / IDENTITY, identity)
            ledger = Ledger(out)
            try:
                yield ledger
            except BaseException:
                if not ledger.entries:
                    _clear(out)
                raise
    finally:
        # it stays if anything is in it
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Replace a file: its old or its new contents are there, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_path(path.parent)


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Write the identity, or compare it with the one that is there."""
    if not path.exists():
        data = {"version": VERSION, "identity": identity}
        write_whole(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
        return
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, then = data["version"], data["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); start again with --overwrite instead of --resume"
        ) from error
    if version != VERSION:
        raise InputError(
            f"{path}: version {version!r}; this release reads {VERSION}: start again with "
            "--overwrite instead of --resume"
        )
    check_identity(then, identity, path)


def _clear(out: Path) -> None:
    """Remove what a comparison writes, the identity last: what is left until then is known as
    one's."""
    for path in (out / RESULT, out / TABLES, out / CELLS, *sorted(out.glob(PLOTS))):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / MOMENTS, ignore_errors=True)
    (out / IDENTITY).unlink(missing_ok=True)

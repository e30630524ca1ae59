"""Journal: how far a compression is, as one JSON file that is replaced atomically.

`identity` is everything the result depends on; a run with another one must not go on from here.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError

VERSION = 1
KEYS = {
    *("stage", "layer", "layers", "identity", "widths", "sites", "generator", "folder"),
    *("hidden", "written", "notes"),
}


@dataclass(frozen=True)
class Journal:
    """Attributes: `path` of the file, which need not exist."""

    path: Path

    def read(self) -> dict[str, Any] | None:
        """The last entry, or None.

        Raises:
            InputError: the file is damaged or of another release.
        """
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({error}); start again with --overwrite instead "
                "of --resume"
            ) from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise InputError(
                f"{self.path}: written by another release; start again with --overwrite instead "
                "of --resume"
            )
        if missing := sorted(KEYS - data.keys()):
            raise InputError(
                f"{self.path}: damaged, {missing[0]} is missing; start again with --overwrite "
                "instead of --resume"
            )
        return data

    def write(self, entry: dict[str, Any]) -> None:
        """Replace the entry; what it refers to must be on disk already."""
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **entry}, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        sync_path(self.path.parent)

    def damaged(self) -> bool:
        """Whether nothing can go on from it."""
        try:
            return self.read() is None
        except InputError:
            return True

    def progress(self) -> str:
        """How far it is, for people."""
        entry = None if self.damaged() else self.read()
        if entry is None:
            return "its journal is damaged"
        what = "surveyed" if entry["stage"] == "survey" else "pruned"
        return f"{entry['layer']} of {entry['layers']} layers {what}"


def check_identity(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raises InputError, naming what changed since the journal was written.

    Nested dictionaries are compared key by key, in order: the settings come before what follows
    from them.
    """
    for key in {**now, **then}:
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            check_identity(
                {f"{key}.{name}": value for name, value in before.items()},
                {f"{key}.{name}": value for name, value in after.items()},
                path,
            )
        elif before != after:
            raise InputError(
                f"--resume: {key} is {_short(after)}, and {_short(before)} in {path}; "
                "restore it, or start again with --overwrite instead"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sync_tree(folder: Path) -> None:
    """Make a folder last with all that is in it: a rename may reach the disk before the files."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Make a file, or the names in a folder, last. Raises OSError with its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot with a folder, and need not
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)):
            # that of a descriptor names no file
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)

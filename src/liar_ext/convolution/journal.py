"""What was measured for the tables, line by line: for a run to go on from, or another budget."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError

VERSION = 1


class TableFile:
    """A file of JSON lines: what it was measured of, then an entry for each measurement.

    Attributes:
        path: of the file, made with the first entry.
        importance: (start, end, kernel) -> what was measured of the segment.
        rounds: samples of each work, a dictionary for each pass over all of them.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.importance: dict[tuple[int, int, int], dict[str, Any]] = {}
        self.rounds: list[dict[str, list[float]]] = []
        self._identity = json.loads(json.dumps(identity))
        self._whole = 0
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self.importance) + len(self.rounds)

    def add(self, entry: dict[str, Any]) -> None:
        """Keep an entry; it is on disk when this returns."""
        self._take(entry)
        try:
            with open(self.path, "r+b" if self._whole else "wb") as file:
                if not self._whole:
                    file.write(_line({"version": VERSION, "identity": self._identity}))
                else:
                    # what a killed run may have left of a line goes
                    file.truncate(self._whole)
                    file.seek(self._whole)
                file.write(_line(entry))
                file.flush()
                os.fsync(file.fileno())
                self._whole = file.tell()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def samples(self) -> dict[str, list[float]]:
        """All samples of each work."""
        names = self.rounds[0] if self.rounds else {}
        return {name: [s for part in self.rounds for s in part[name]] for name in names}

    def _take(self, entry: dict[str, Any]) -> None:
        if "latency" in entry:
            self.rounds.append(entry["latency"])
        else:
            start, end, kernel = entry["segment"]
            self.importance[start, end, kernel] = entry["importance"]

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        self._whole = data.rfind(b"\n") + 1
        lines = data[: self._whole].splitlines()
        if not lines:
            return
        try:
            head, *entries = [json.loads(line) for line in lines]
            if head["version"] != VERSION:
                raise InputError(
                    f"{self.path}: of another release; delete it, or give another --tables"
                )
            _check(head["identity"], self._identity, self.path)
            for entry in entries:
                self._take(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path}: is no table of `liar fuse` ({error!r}); give another --tables"
            ) from error


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _check(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming what differs."""
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            told = f"{str(now.get(key))[:60]}, and {str(then.get(key))[:60]} in {path}"
            raise InputError(f"--tables: {key} is {told}; give another file, or delete that one")

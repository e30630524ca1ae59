"""What was measured for the tables, line by line: for a run to go on from, or another budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from liar_ext.convolution.chain import Segment
from liar_ext.errors import InputError

VERSION = 1
# numbers that the importance of a segment is made of
_MEASURED = ("loss", "accuracy")


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

    def check(self, segments: Sequence[Segment], works: Collection[str]) -> None:
        """Whether what is here is of one network: a plan would be made of it as it stands.

        Args:
            segments: those of which the importance is measured; some may be missing yet.
            works: names of all that is timed, once in every round; they tell shapes.
        Raises:
            InputError: a row is of another segment or work, lacks one, or has no numbers.
        """
        known = frozenset(works)
        kept = {segment.key: list(segment.kept) for segment in segments}
        for key, row in self.importance.items():
            start, end, kernel = key
            name = f"the row of segment {start}-{end} with kernel {kernel}"
            if key not in kept:
                self._refuse(f"{name} is of no segment of this network")
            if not isinstance(row, dict) or not all(map(_number, map(row.get, _MEASURED))):
                self._refuse(f"{name} lacks a number: {' or '.join(_MEASURED)}")
            if row.get("kept") != kept[key]:
                self._refuse(f"{name} keeps {row.get('kept')}, and here it keeps {kept[key]}")
        for number, times in enumerate(self.rounds, 1):
            name = f"entry {number} of latencies"
            if not isinstance(times, dict):
                self._refuse(f"{name} has no times by name")
            for work in works:
                if work not in times:
                    self._refuse(f"{name} lacks {work!r}")
            for work, samples in times.items():
                if work not in known:
                    self._refuse(f"{name} has {work!r}, which is nothing of this network")
                if not (isinstance(samples, list) and samples and all(map(_time, samples))):
                    self._refuse(f"{name} has no times above 0 for {work!r}")
            if len({len(samples) for samples in times.values()}) > 1:
                self._refuse(f"{name} has more rounds of some than of others")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}; delete the file, or give another --tables")

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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _time(value: Any) -> bool:
    return _number(value) and value > 0


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _check(then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming what differs."""
    for key in {**now, **then}:
        if then.get(key) != now.get(key):
            told = f"{str(now.get(key))[:60]}, and {str(then.get(key))[:60]} in {path}"
            raise InputError(f"--tables: {key} is {told}; give another file, or delete that one")

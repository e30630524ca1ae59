"""Ledger of a search: every candidate that was tried, on disk before the next one is.

Searches depend on their seed and the answers alone, so one that is interrupted asks the same again
and has its answers from here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from liar_ext.allocation.search import Candidate
from liar_ext.errors import InputError

FILE = "liar_search.jsonl"


class SearchLedger:
    """Losses by candidate and number of windows.

    Args:
        path: file to add to, with what is there; None keeps them in memory. A loss that is not
            finite is `null` there, for which JSON has no number.
    Raises:
        InputError: a line is damaged. One that a killed process left half-written is removed.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._losses: dict[tuple[Candidate, int], float] = {}
        data = path.read_bytes() if path is not None and path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                candidate = tuple(int(units) for units in entry["units"])
                loss = math.inf if entry["loss"] is None else float(entry["loss"])
                self._losses[candidate, int(entry["windows"])] = loss
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: line {number} is damaged ({error}); start again with --overwrite "
                    "instead of --resume"
                ) from error
        if path is not None and whole < len(data):
            os.truncate(path, whole)

    def __len__(self) -> int:
        return len(self._losses)

    def get(self, candidate: Candidate, windows: int) -> float | None:
        return self._losses.get((candidate, windows))

    def items(self) -> Iterator[tuple[Candidate, int, float]]:
        """In the order in which they were tried."""
        for (candidate, windows), loss in self._losses.items():
            yield candidate, windows, loss

    def spent(self, windows: int) -> float:
        """What was tried, in candidates on all of so many windows."""
        return sum(own for _, own in self._losses) / windows

    def best(self, windows: int) -> float:
        """The least loss on so many windows; infinite before there is one."""
        return min((x for (_, own), x in self._losses.items() if own == windows), default=math.inf)

    def add(self, candidates: Sequence[Candidate], windows: int, losses: Sequence[float]) -> None:
        lines = []
        for candidate, loss in zip(candidates, losses, strict=True):
            self._losses[candidate, windows] = loss
            said = loss if math.isfinite(loss) else None
            lines.append(json.dumps({"units": candidate, "windows": windows, "loss": said}) + "\n")
        if self._path is not None:
            with open(self._path, "ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())

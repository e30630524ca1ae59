"""A checkpoint's layers that stay in memory once they were opened."""

from __future__ import annotations

from collections.abc import Iterable

from liar_ext.checkpoint.store import CheckpointStore


class Resident:
    """LayerStore that reads each layer once; with memory for all of them, passes are free."""

    def __init__(self, store: CheckpointStore) -> None:
        self.model = store.model
        self._store = store
        self._open: set[int] = set()

    def open_outside(self) -> None:
        self._store.open_outside()

    def close_outside(self) -> None:
        self._store.close_outside()

    def open_head(self) -> None:
        self._store.open_head()

    def close_head(self) -> None:
        self._store.close_head()

    def prepare(self, widths: list[dict[str, int]], added_biases: list[str], done: int) -> None:
        self._store.prepare(widths, added_biases, done)

    def expect(self, layers: Iterable[int]) -> None:
        """What was opened is here, and all of it is read in one pass."""

    def open(self, index: int, *, aside: bool = False) -> None:
        if index not in self._open:
            self._store.open(index)
            self._open.add(index)

    def close(self, index: int, *, final: bool) -> None:
        """It stays."""

    def written(self) -> dict[str, str]:
        return self._store.written()

"""sha256 of the source's files, computed once on each host and the same on all of them."""

from __future__ import annotations

import os

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.engine.ranks import Ranks
from liar_ext.errors import InputError


class SourceSums:
    """Begins to hash in the background; ranks that share a host leave it to the first of them."""

    def __init__(self, reader: CheckpointReader, ranks: Ranks) -> None:
        self._reader, self._ranks = reader, ranks
        # torchrun counts the ranks of a host
        self._mine = ranks.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        if self._mine:
            # a thread hashes about 1.5 GB/s; the rest of the cores have other work
            reader.start_hashing(threads=max(1, (os.cpu_count() or 1) // 4))

    def ready(self) -> bool:
        """Whether `get` would not wait for this host."""
        return not self._mine or self._reader.hashed()

    def get(self) -> dict[str, str]:
        """The sums, by file; every rank calls this, and waits.

        Raises:
            InputError: a file changed since it was opened, or differs between hosts.
        """
        every = self._ranks.gather(self._reader.hashes() if self._mine else None)
        sums: list[dict[str, str]] = [found for found in every if found is not None]
        for other in sums[1:]:
            changed = [file for file in sums[0] if other.get(file) != sums[0][file]]
            if changed:
                raise InputError(
                    f"{changed[0]}: has other contents on another host; all hosts need the same "
                    "checkpoint"
                )
        return sums[0]

    def stop(self) -> None:
        """Nobody will ask."""
        self._reader.stop_hashing()

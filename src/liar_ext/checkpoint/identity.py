"""Which file it was: reads that notice a replaced file, and sha256 sums made in the background."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from liar_ext.errors import InputError

# large enough that hashlib's and the kernel's cost per call vanish, small enough to stop at once
HASH_BLOCK = 8 * 1024**2


@dataclass(frozen=True)
class FileIdentity:
    """What `fstat` says of a file while nobody replaces, resizes or rewrites it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, handle: int) -> FileIdentity:
        found = os.fstat(handle)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def opened(path: Path, expected: FileIdentity | None = None) -> Iterator[int]:
    """A read-only descriptor of `path`, closed when the block ends.

    Args:
        expected: what the file was when it was first looked at; None the first time.
    Raises:
        InputError: the file is gone, may not be read, or is not the expected one any more.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise InputError(
            f"{path}: permission denied; run as a user who may read it, or chmod it and the "
            "folders above"
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: was removed while it was being read; put the checkpoint back and start again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); try again") from error
    try:
        if expected is not None:
            check_unchanged(path, handle, expected)
        yield handle
    finally:
        os.close(handle)


def check_unchanged(path: Path, handle: int, expected: FileIdentity) -> None:
    """Raise InputError if the open file is not the one that `expected` describes."""
    if FileIdentity.of(handle) != expected:
        raise InputError(
            f"{path}: was replaced or changed while it was being read; leave the checkpoint as it "
            "is during a run, and start again"
        )


def read_into(path: Path, handle: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset` on; `path` is for the message.

    Raises:
        InputError: the file ends before the buffer is full, or the read fails.
    """
    done = 0
    while done < len(buffer):
        try:
            # Linux reads 2 GiB at most in one call
            got = os.preadv(handle, [buffer[done:]], offset + done)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read at byte {offset + done} ({error.strerror}); check the "
                "disk, or download the file again"
            ) from error
        if got == 0:
            raise InputError(
                f"{path}: ends at byte {offset + done}, before the {len(buffer)} bytes at "
                f"{offset} are complete; it was truncated, download it again"
            )
        done += got


class FileHasher:
    """The sha256 of whole files, computed by daemon threads: no exit or error waits for them.

    hashlib lets go of the GIL, so this costs a core, not the run's time.
    """

    def __init__(self, files: Mapping[Path, FileIdentity], threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; give 1 or more")
        self._files = dict(files)
        self._todo = deque(self._files)
        self._sums: dict[Path, str] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()
        for _ in range(min(threads, len(self._files))):
            threading.Thread(target=self._work, name="liar-ext-sha256", daemon=True).start()

    def stop(self) -> None:
        """Make the threads end at their next block; returns at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self) -> dict[Path, str]:
        """All sums as hexadecimal, once they are there.

        Raises:
            InputError: a file cannot be read, or changed before, during or after it was read.
            RuntimeError: `stop` was called before all were ready.
        """
        with self._changed:
            self._changed.wait_for(self.over)
            if self._error is not None:
                raise self._error
            if len(self._sums) < len(self._files):
                raise RuntimeError("hashing was stopped before all files were read")
            sums = {path: self._sums[path] for path in self._files}
        for path, identity in self._files.items():
            with opened(path, identity):
                pass
        return sums

    def over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._stopped or self._error is not None or len(self._sums) == len(self._files)

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stopped or self._error is not None or not self._todo:
                    return
                path = self._todo.popleft()
            try:
                found = self._sum(path)
            except Exception as error:  # raised where somebody waits: a thread's end is silent
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            if found is None:
                return
            with self._changed:
                self._sums[path] = found
                self._changed.notify_all()

    def _sum(self, path: Path) -> str | None:
        """The sum of one file; None if `stop` was called."""
        identity = self._files[path]
        block = memoryview(bytearray(HASH_BLOCK))
        found = hashlib.sha256()
        with opened(path, identity) as handle:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for offset in range(0, identity.size, HASH_BLOCK):
                if self._stopped:
                    return None
                part = block[: min(HASH_BLOCK, identity.size - offset)]
                read_into(path, handle, part, offset)
                found.update(part)
            check_unchanged(path, handle, identity)
        return found.hexdigest()

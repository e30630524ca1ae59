"""Safetensors files of known shapes, made at their full size first and filled in place after.

All output shapes are known before the first layer is pruned, so every byte has its place up front:
nothing is collected in memory, tensors come in any order and from several threads or processes, a
run that was killed goes on in the files it left, and a full disk shows before hours of work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.checkpoint.dtypes import TORCH_DTYPES
from liar_ext.checkpoint.identity import read_into
from liar_ext.checkpoint.journal import sync_path
from liar_ext.checkpoint.reader import INDEX, PIECE_BYTES, SINGLE, raw_bytes
from liar_ext.checkpoint.writer import SHARD_BYTES, write_json
from liar_ext.errors import InputError

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
READ_BLOCK = 8 * 1024**2
# what posix_fallocate says where a file system cannot reserve space; a full disk is ENOSPC
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: what it is called and how many bytes of what it has."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorDigest:
    """sha256 of tensors in the order they come: each one's name, dtype, shape and bytes.

    Of the same tensors in the same order, `ShardWriter.digest` and `digest_of` say the same.
    """

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def begin(self, spec: TensorSpec) -> None:
        """Mix in what the next tensor is; its bytes follow by `update`."""
        head = [spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape)]
        self._sum.update(json.dumps(head).encode() + b"\n")

    def update(self, raw: memoryview) -> None:
        self._sum.update(raw)

    def add(self, name: str, tensor: Tensor) -> None:
        """One whole tensor, from any device."""
        self.begin(TensorSpec(name, tuple(tensor.shape), tensor.dtype))
        for piece in _flat_pieces(tensor):
            self.update(raw_bytes(piece))

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What `ShardWriter.digest` says of these tensors once they are written, without writing."""
    digest = TensorDigest()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes go: `begin` counts from the start of the file."""

    spec: TensorSpec
    file: str
    begin: int


class ShardWriter:
    """Writes tensors to their places in a folder's safetensors files.

    `write`, `write_pieces`, `digest`, `sync` and `mark_written` may be called from several threads,
    for different tensors. Processes share a folder so: one makes the files (`create=True`), the
    others wait for that, open them with `create=False` and `sync` what they wrote; then one marks
    all and calls `finish`.

    Args:
        specs: all tensors, in the order in which they go into shards. Within a shard wide elements
            come first, so that each tensor is aligned.
        shard_bytes: of tensors in a file at most; only a single larger tensor exceeds it.
        create: make the files, or empty and remake those that exist; False opens them as they are.
    Attributes:
        bytes: of all tensors; files: names of the shards; names: of the tensors, as given.
    Raises:
        InputError: `create` is False and a file is missing, or not the one that these specs make.
        OSError: a file cannot be made, or the disk does not hold it; names the file.
        ValueError: a name twice, or a dtype that safetensors does not have.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        shard_bytes: int = SHARD_BYTES,
        create: bool = True,
    ) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._handles: dict[str, int] = {}
        # also when a run fails and nobody calls close
        self._finalizer = weakref.finalize(self, _close_all, self._handles)
        self._written: set[str] = set()
        self._lock = threading.Lock()
        _check(specs, shard_bytes)
        shards = plan_shards(specs, shard_bytes)
        layouts = {}
        for number, members in enumerate(shards, 1):
            total = len(shards)
            name = f"model-{number:05d}-of-{total:05d}.safetensors" if total > 1 else SINGLE
            header, begins = _layout(members)
            self._places |= {s.name: _Place(s, name, begins[s.name]) for s in members}
            layouts[name] = header, len(header) + sum(spec.bytes for spec in members)
        self.names = tuple(spec.name for spec in specs)
        self.files = tuple(layouts)
        self.bytes = sum(spec.bytes for spec in specs)
        try:
            for name, (header, size) in layouts.items():
                self._make(name, header, size) if create else self._open(name, header, size)
            if create:
                sync_path(folder)
        except BaseException:
            # space that was reserved in vain is what a full disk lacks
            made = list(self._handles) if create else []
            self.close()
            for name in made:
                (folder / name).unlink(missing_ok=True)
            raise

    def write(self, name: str, tensor: Tensor, digest: TensorDigest | None = None) -> None:
        """Put a tensor, of any device, to its place.

        Args:
            digest: takes in the bytes on the way. Of no use after an exception.
        Raises:
            ValueError: not the shape or dtype of its spec.
            OSError: writing failed; names the file.
        """
        spec = self._places[name].spec
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, but was planned as "
                f"{spec.dtype} {spec.shape}"
            )
        self.write_pieces(name, _flat_pieces(tensor), digest)

    def write_pieces(
        self, name: str, pieces: Iterable[Tensor], digest: TensorDigest | None = None
    ) -> None:
        """Put a tensor to its place from pieces of its elements in order.

        Raises:
            ValueError: another dtype, or the pieces are not exactly the tensor; its place may
                then hold some of them, its neighbours are as they were.
            OSError: writing failed; names the file.
        """
        place = self._places[name]
        with self._lock:
            self._written.discard(name)
        if digest is not None:
            digest.begin(place.spec)
        done = 0
        for piece in pieces:
            if piece.dtype != place.spec.dtype:
                raise ValueError(
                    f"{name}: a piece is {piece.dtype}, but was planned as {place.spec.dtype}"
                )
            raw = raw_bytes(piece.detach().to("cpu").contiguous())
            if done + len(raw) > place.spec.bytes:
                raise ValueError(f"{name}: the pieces exceed its {place.spec.bytes} bytes")
            self._write(place.file, raw, place.begin + done)
            if digest is not None:
                digest.update(raw)
            done += len(raw)
        if done != place.spec.bytes:
            raise ValueError(f"{name}: the pieces are {done} of its {place.spec.bytes} bytes")
        with self._lock:
            self._written.add(name)

    def mark_written(self, names: Iterable[str]) -> None:
        """Take these tensors as written: by an earlier run or another process."""
        names = list(names)
        unknown = [name for name in names if name not in self._places]
        if unknown:
            raise ValueError(f"{unknown[0]}: is no tensor of these shards")
        with self._lock:
            self._written.update(names)

    def digest(self, names: Sequence[str]) -> str:
        """sha256 of these tensors as the files have them, in this order (`TensorDigest`).

        Raises:
            InputError: a file was truncated, or cannot be read.
        """
        digest = TensorDigest()
        block = memoryview(bytearray(READ_BLOCK))
        for name in names:
            place = self._places[name]
            digest.begin(place.spec)
            for done in range(0, place.spec.bytes, READ_BLOCK):
                part = block[: min(READ_BLOCK, place.spec.bytes - done)]
                path = self._folder / place.file
                read_into(path, self._handle(place.file), part, place.begin + done)
                digest.update(part)
        return digest.hexdigest()

    def sync(self, names: Iterable[str] | None = None) -> None:
        """Wait until what was written to these tensors (None: to all) is on the disk."""
        places = self._places.values() if names is None else [self._places[n] for n in names]
        wanted = {place.file for place in places}
        for file in [file for file in self.files if file in wanted]:
            with _naming(self._folder / file):
                os.fdatasync(self._handle(file))

    def finish(self) -> None:
        """Make the folder complete and durable: sync all, write the index if there are shards.

        Closes the files. To be called when no thread writes any more.

        Raises:
            RuntimeError: a tensor was neither written nor marked.
        """
        missing = [name for name in self.names if name not in self._written]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were never written, first {missing[0]}")
        for file in self.files:
            with _naming(self._folder / file):
                os.fsync(self._handle(file))
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self.bytes},
                "weight_map": {name: self._places[name].file for name in self.names},
            }
            path = self._folder / INDEX
            with _naming(path):
                write_json(path, index)
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        sync_path(self._folder)
        self.close()

    def close(self) -> None:
        """Let go of the files; what was written stays. To be called when no thread writes."""
        self._finalizer()

    def _make(self, name: str, header: bytes, size: int) -> None:
        path = self._folder / name
        with _naming(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._handles[name] = handle
            try:
                # where the file system has no such call, as NFS before 4.2, glibc writes a byte
                # into each 4 KiB: slower, and it reserves as well
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                if error.errno not in CANNOT_RESERVE:
                    raise
                os.ftruncate(handle, size)
        # last: a file that was left half made has no header, and is refused
        self._write(name, memoryview(header), 0)
        with _naming(path):
            # a journal entry counts on all of the files, whichever it is that holds its layer
            os.fsync(handle)

    def _open(self, name: str, header: bytes, size: int) -> None:
        path = self._folder / name
        try:
            self._handles[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing; delete {self._folder} and start again") from error
        except PermissionError as error:
            raise InputError(
                f"{path}: permission denied; run as the user who began it, or chmod the file"
            ) from error
        found = os.fstat(self._handles[name]).st_size
        start = memoryview(bytearray(len(header)))
        if found == size:
            read_into(path, self._handles[name], start, 0)
        if start != header:
            raise InputError(
                f"{path}: is not the file that this run would make (its header differs, or its "
                f"size: {found} bytes, expected {size}); use the settings and the model it was "
                f"begun with, or delete {self._folder} and start again"
            )

    def _write(self, file: str, raw: memoryview, offset: int) -> None:
        path, handle, done = self._folder / file, self._handle(file), 0
        with _naming(path):
            while done < len(raw):
                # Linux writes 2 GiB at most in one call, and less when a signal comes
                got = os.pwrite(handle, raw[done:], offset + done)
                if got == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
                done += got

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            raise RuntimeError(f"{self._folder / file}: is closed already")
        return self._handles[file]


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors into shards of at most `shard_bytes`; one shard if there are none."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    # stable: tensors of one width stay in order, and each begins at a multiple of its width
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def _layout(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, length and JSON, and where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for spec in specs:
        begins[spec.name], end = end, end + spec.bytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end - spec.bytes, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + b for n, b in begins.items()}


def _check(specs: Sequence[TensorSpec], shard_bytes: int) -> None:
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; give 1 or more")
    taken = {"__metadata__"}
    for spec in specs:
        if spec.name in taken:
            raise ValueError(f"{spec.name}: a name twice, or the one safetensors keeps for itself")
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(f"{spec.name}: safetensors has no {spec.dtype}")
        taken.add(spec.name)


def _flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in order, in contiguous CPU memory, without a second copy of a large tensor."""
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(PIECE_BYTES // tensor.dtype.itemsize, 1)):
        yield piece.to("cpu").contiguous()  # a column of a matrix is flat and has gaps


def _close_all(handles: dict[str, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError of a descriptor does not say of which file; `output_folder` wants to know."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error

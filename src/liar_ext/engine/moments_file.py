"""One Site's Moments as a safetensors file: the triangle without what is above it, and sums of all.

Tensors: `count`, `sum`, `squares`, `gram` (rows of the lower triangle one after the other), and
`check`, two sha256 sums: of all before `gram`, and of everything. They begin with what the caller
says the file is, so that a file in the wrong place is noticed as damage is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from liar_ext.checkpoint.identity import FileIdentity, read_into
from liar_ext.checkpoint.reader import raw_bytes
from liar_ext.checkpoint.shards import DTYPE_NAMES, ShardWriter, TensorDigest, TensorSpec
from liar_ext.errors import InputError
from liar_ext.ops.moments import Moments

# of the square that is packed or unpacked at a time
BLOCK_BYTES = 64 * 1024**2


def digest_begun(text: str) -> TensorDigest:
    """A sum that begins with a text: what the file is."""
    digest = TensorDigest()
    digest.update(memoryview(text.encode()))
    return digest


def write_moments(
    writer: ShardWriter, moments: Moments, squares: Tensor, digest: TensorDigest
) -> None:
    """All tensors of `specs_of`, in the order in which the sums take them in."""
    writer.write("count", moments.count, digest)
    writer.write("sum", moments.sum, digest)
    writer.write("squares", squares, digest)
    sums = bytes.fromhex(digest.hexdigest())
    writer.write_pieces("gram", packed(moments.gram), digest)
    sums += bytes.fromhex(digest.hexdigest())
    writer.write("check", torch.tensor(list(sums), dtype=torch.uint8).view(2, 32))


class SiteFile:
    """A Site's file, open; InputError for whatever is not as it was written."""

    def __init__(self, path: Path, handle: int, digest: TensorDigest) -> None:
        self._path, self._handle, self._digest = path, handle, digest
        size = FileIdentity.of(handle).size
        if size < 8:
            raise self._damaged(f"{size} bytes")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > size - 8:
            raise self._damaged(f"{size} bytes are less than its header")
        try:
            header = json.loads(self._bytes(8, length))
            count = header["sum"]["shape"][0]
            names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
            self.gram_dtype = names[header["gram"]["dtype"]]
            self._specs = {spec.name: spec for spec in specs_of(count, self.gram_dtype)}
            self._begin = {}
            for name, spec in self._specs.items():
                entry = header[name]
                begin, end = entry["data_offsets"]
                found = TensorSpec(name, tuple(entry["shape"]), names[entry["dtype"]])
                if found != spec or end - begin != spec.bytes:
                    raise ValueError(name)
                self._begin[name] = 8 + length + begin
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damaged("its header makes no sense") from error
        ends = [self._begin[name] + spec.bytes for name, spec in self._specs.items()]
        if max(ends) != size:
            raise self._damaged(f"{size} bytes, not {max(ends)}")

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sums and sums of squares; verified."""
        count, total, squares = (self.piece(name) for name in ("count", "sum", "squares"))
        self.verify(0)
        return count.reshape(()), total, squares

    def gram(self, columns: int, device: torch.device | str) -> Tensor:
        """The square, zeros above the diagonal; verified. To be called after `columns`."""
        gram = torch.zeros(columns, columns, dtype=self.gram_dtype, device=device)
        for start, stop in row_blocks(columns, gram.dtype):
            square = gram[start:stop, :stop]
            here = square.device.type == "cpu"
            rows = square if here else torch.zeros_like(square, device="cpu")
            unpack(self.piece("gram", triangle(start), triangle(stop)), rows, start)
            if not here:
                square.copy_(rows)
        self.verify(1)
        return gram

    def piece(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start:stop` of a tensor; to be read in order, the sums take them in."""
        spec = self._specs[name]
        if start == 0:
            self._digest.begin(spec)
        stop = spec.bytes // spec.dtype.itemsize if stop is None else stop
        found = torch.empty(stop - start, dtype=spec.dtype)
        raw = raw_bytes(found)
        read_into(self._path, self._handle, raw, self._begin[name] + start * spec.dtype.itemsize)
        self._digest.update(raw)
        return found

    def verify(self, number: int) -> None:
        """Compare the sum so far with row `number` of `check`."""
        found = self._bytes(self._begin["check"] + 32 * number, 32)
        if bytes(found).hex() != self._digest.hexdigest():
            raise self._damaged("its sha256 is not that of what was written for this Site")

    def _bytes(self, offset: int, size: int) -> bytearray:
        found = bytearray(size)
        read_into(self._path, self._handle, memoryview(found), offset)
        return found

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self._path}: truncated or damaged ({reason}); delete it and run again")


def specs_of(columns: int, dtype: torch.dtype) -> list[TensorSpec]:
    return [
        TensorSpec("count", (), torch.int64),
        TensorSpec("sum", (columns,), torch.float64),
        TensorSpec("squares", (columns,), torch.float64),
        TensorSpec("gram", (triangle(columns),), dtype),
        TensorSpec("check", (2, 32), torch.uint8),
    ]


def triangle(rows: int) -> int:
    """Elements of the first rows of a lower triangle."""
    return rows * (rows + 1) // 2


def row_blocks(columns: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // max(columns * dtype.itemsize, 1))
    for start in range(0, columns, rows):
        yield start, min(start + rows, columns)


def packed(gram: Tensor) -> Iterator[Tensor]:
    """The lower triangle row by row, in pieces on the CPU."""
    for start, stop in row_blocks(gram.shape[0], gram.dtype):
        piece = torch.empty(triangle(stop) - triangle(start), dtype=gram.dtype)
        # NumPy: 1 µs a row, where a torch slice and copy are 5
        target, rows = piece.numpy(), gram[start:stop, :stop].detach().cpu().numpy()
        at = 0
        for row in range(start, stop):
            target[at : at + row + 1] = rows[row - start, : row + 1]
            at += row + 1
        yield piece


def unpack(piece: Tensor, rows: Tensor, start: int) -> None:
    """The inverse of `packed` for rows `start`, `start + 1`, ... of the square."""
    source, target = piece.numpy(), rows.numpy()
    at = 0
    for row in range(rows.shape[0]):
        width = start + row + 1
        target[row, :width] = source[at : at + width]
        at += width

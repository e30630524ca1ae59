"""Shelves: where hidden states and paused forwards wait while other batches are computed.

`device` keeps tensors where they are; `host` is pinned memory beside a GPU; `disk` is one file for
each tensor, written and read whole: pages of a mapped file count as resident, those of a file that
is read do not. What comes back has the same bits, so a shelf never changes a result.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

PLACES = ("device", "host", "disk")
# one call of the operating system moves at most 2 GiB
_CALL_BYTES = 1 << 30


class Item(Protocol):
    """A tensor on a shelf."""

    def fetch(self) -> Tensor:
        """It, on the compute device; the shelf keeps its own."""

    def refill(self, target: Tensor) -> None:
        """Copy it into a tensor of the same number of bytes on the compute device."""

    def save(self, path: Path) -> dict[str, Any]:
        """Write its bytes to a file; returns shape and dtype as JSON data."""

    def free(self) -> None:
        """It is not needed any more."""


class Shelf(Protocol):
    """Attributes: `moves`, whether `put` takes the bytes away from the compute device's memory."""

    moves: bool

    def put(self, tensor: Tensor) -> Item:
        """Take a tensor. Where the shelf `moves`, its memory may be given back afterwards."""


def free_all(states: Mapping[Any, Item]) -> None:
    """None of these is needed any more."""
    for item in states.values():
        item.free()


class DeviceShelf:
    """Tensors stay where they are computed."""

    moves = False

    def put(self, tensor: Tensor) -> Item:
        return _Here(tensor)


class HostShelf:
    """Pinned host memory. Copies are queued on the current stream, in order with the kernels."""

    moves = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def put(self, tensor: Tensor) -> Item:
        pinned = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type != "cpu"
        )
        pinned.copy_(tensor, non_blocking=True)
        return _Pinned(pinned, self._device)


class DiskShelf:
    """Files in a folder, one for each tensor."""

    moves = True

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._count = 0

    def put(self, tensor: Tensor) -> Item:
        self._count += 1
        path = self._folder / f"{self._count:08d}"
        write_bytes(path, tensor)
        return _Filed(path, tensor.shape, tensor.dtype, self._device)


class _Here:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def fetch(self) -> Tensor:
        assert self._tensor is not None, "it was given up"
        return self._tensor

    def refill(self, target: Tensor) -> None:
        target.copy_(self.fetch())

    def save(self, path: Path) -> dict[str, Any]:
        write_bytes(path, self.fetch())
        return described(self.fetch().shape, self.fetch().dtype)

    def free(self) -> None:
        self._tensor = None


class _Pinned(_Here):
    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        super().__init__(tensor)
        self._device = device

    def fetch(self) -> Tensor:
        held = super().fetch()
        return torch.empty_like(held, device=self._device, pin_memory=False).copy_(
            held, non_blocking=True
        )

    def refill(self, target: Tensor) -> None:
        target.copy_(super().fetch(), non_blocking=True)

    def save(self, path: Path) -> dict[str, Any]:
        held = super().fetch()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copy into `held` may still be queued
        write_bytes(path, held)
        return described(held.shape, held.dtype)


class _Filed:
    def __init__(
        self, path: Path, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._path, self._shape, self._dtype, self._device = path, shape, dtype, device

    def fetch(self) -> Tensor:
        found = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self.refill(found)
        return found

    def refill(self, target: Tensor) -> None:
        read_bytes(self._path, target)

    def save(self, path: Path) -> dict[str, Any]:
        try:
            # nothing ever writes to it again, so a second name is a copy
            os.link(self._path, path)
        except OSError:  # another file system, or one without links
            write_bytes(path, self.fetch())
        return described(self._shape, self._dtype)

    def free(self) -> None:
        self._path.unlink(missing_ok=True)


def described(shape: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    """Shape and dtype as JSON data, for `restored`."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def restored(path: Path, data: dict[str, Any], device: torch.device) -> Tensor:
    """The tensor that `Item.save` wrote to `path`.

    Raises:
        OSError: the file is missing or has another size.
    """
    found = torch.empty(data["shape"], dtype=getattr(torch, data["dtype"]), device=device)
    read_bytes(path, found)
    return found


def write_bytes(path: Path, tensor: Tensor) -> None:
    """The bytes of a tensor in its logical order. Raises OSError with the file's name."""
    held = tensor.detach().cpu().contiguous()
    view = _memory(held)
    with open(path, "wb", buffering=0) as file:
        at = 0
        try:
            while at < len(view):
                at += file.write(view[at : at + _CALL_BYTES])
        except OSError as error:
            # a failed write names no file
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_bytes(path: Path, target: Tensor) -> None:
    """Fill a tensor from a file of exactly its size. Raises OSError with the file's name."""
    direct = target.device.type == "cpu" and target.is_contiguous()
    buffer = target if direct else torch.empty(target.shape, dtype=target.dtype)
    view = _memory(buffer)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < len(view) and (got := file.readinto(view[at : at + _CALL_BYTES])):
            at += got
    if at != len(view) or size != len(view):
        raise OSError(None, f"has {size} bytes, not {len(view)}", os.fspath(path))
    if not direct:
        target.copy_(buffer)


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which has to outlive the view.

    Not through numpy: a storage that numpy has seen cannot be resized any more.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")

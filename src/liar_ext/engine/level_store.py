"""Levels: what a repair makes of each Site at a few widths, made once, read for every candidate.

ZipLM's database (arXiv 2302.04089). One file for each width of a Site, written whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liar_ext.checkpoint.journal import sync_path
from liar_ext.engine.execution import free_bytes
from liar_ext.errors import InputError
from liar_ext.report.text import size

# (layer, kind)
Key = tuple[int, str]

# in the metadata of a file
_NOTES = "notes"
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Level:
    """One width of one Site.

    Attributes:
        keep: units, (units,) int64 sorted; weight: of the repaired consumer, (out, kept columns).
        bias: of the repaired consumer, (out,); None where it stays as it is.
        notes: what had to be raised or repeated for it.
    """

    keep: Tensor
    weight: Tensor
    bias: Tensor | None
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {"keep": self.keep, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Level:
        bias = None if self.bias is None else self.bias.to(device)
        return Level(self.keep.to(device), self.weight.to(device), bias, self.notes)


class Levels(Protocol):
    """Levels of Sites by (layer, kind) and kept units.

    Attributes: `bytes` of those that there are.
    """

    @property
    def bytes(self) -> int: ...

    def has(self, key: Key, units: int) -> bool: ...

    def save(self, key: Key, units: int, level: Level) -> None: ...

    def load(self, key: Key, units: int, device: torch.device) -> Level: ...

    def notes(self, key: Key, units: int) -> tuple[str, ...]:
        """Of a level, without its weights."""

    def discard(self) -> None:
        """The search that they were made for is over."""


class HeldLevels:
    """In the memory of the host: of a GPU's, the levels of a model would take most."""

    def __init__(self) -> None:
        self._held: dict[tuple[Key, int], Level] = {}

    def has(self, key: Key, units: int) -> bool:
        return (key, units) in self._held

    def save(self, key: Key, units: int, level: Level) -> None:
        self._held[key, units] = level.to(torch.device("cpu"))

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        return self._held[key, units].to(device)

    def notes(self, key: Key, units: int) -> tuple[str, ...]:
        return self._held[key, units].notes

    def discard(self) -> None:
        """They stay, for another search of the same model."""

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for level in self._held.values() for t in level.tensors.values())


class FiledLevels:
    """In a folder, which is made for the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, key: Key, units: int) -> bool:
        return self._path(key, units).exists()

    def save(self, key: Key, units: int, level: Level) -> None:
        path = self._path(key, units)
        self._folder.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in level.tensors.items()}
        save_file(tensors, temporary, {_NOTES: json.dumps(level.notes)})
        sync_path(temporary)
        temporary.replace(path)
        sync_path(self._folder)

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        def read(stored: Any) -> Level:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return Level(found["keep"], found["weight"], found.get("bias"), _notes(stored))

        return self._read(key, units, device, read)

    def notes(self, key: Key, units: int) -> tuple[str, ...]:
        return self._read(key, units, torch.device("cpu"), _notes)

    def _read(
        self, key: Key, units: int, device: torch.device, what: Callable[[Any], _Found]
    ) -> _Found:
        path = self._path(key, units)
        try:
            with safe_open(path, framework="pt", device=str(device)) as stored:
                return what(stored)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: a level that the search made cannot be read ({error}); start again with "
                "--overwrite instead of --resume"
            ) from error

    def discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def bytes(self) -> int:
        there = self._folder.glob("*") if self._folder.exists() else ()
        return sum(path.stat().st_size for path in there)

    def _path(self, key: Key, units: int) -> Path:
        return self._folder / f"{key[0]}.{key[1]}.{units}.safetensors"


def _notes(stored: Any) -> tuple[str, ...]:
    return tuple(json.loads(stored.metadata()[_NOTES]))


def check_room(folder: Path | None, needed: int, there: int) -> None:
    """Refuse before anything is computed.

    Args:
        folder: where levels are kept, None for the memory of the host; there: bytes of those that
            are made already.

    Raises:
        InputError: there is no room for `needed` bytes.
    """
    free = free_bytes(torch.device("cpu")) if folder is None else shutil.disk_usage(folder).free
    if needed <= free + there:
        return
    where, instead = (
        ("in memory", "prune from disk to disk (liar prune), which keeps them in files")
        if folder is None
        else (f"in {folder}", "give --out on a larger disk")
    )
    raise InputError(
        f"the levels of a search take {size(needed)} {where}, and {size(free + there)} are free; "
        f"{instead}, or an --allocation that does not search"
    )

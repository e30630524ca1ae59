"""Levels: what a repair makes of each Site at a few widths, made once, read for every candidate.

ZipLM's database (arXiv 2302.04089). One file for each width of a Site, written whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liar_ext.checkpoint.journal import sync_path
from liar_ext.errors import InputError

# (layer, kind)
Key = tuple[int, str]


@dataclass(frozen=True)
class Level:
    """One width of one Site.

    Attributes:
        keep: units, (units,) int64 sorted; weight: of the repaired consumer, (out, kept columns).
        bias: of the repaired consumer, (out,); None where it stays as it is.
    """

    keep: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {"keep": self.keep, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Levels(Protocol):
    """Levels of Sites by (layer, kind) and kept units."""

    def has(self, key: Key, units: int) -> bool: ...

    def save(self, key: Key, units: int, level: Level) -> None: ...

    def load(self, key: Key, units: int, device: torch.device) -> Level: ...


class HeldLevels:
    """In memory, where they were made."""

    def __init__(self) -> None:
        self._held: dict[tuple[Key, int], Level] = {}

    def has(self, key: Key, units: int) -> bool:
        return (key, units) in self._held

    def save(self, key: Key, units: int, level: Level) -> None:
        self._held[key, units] = level

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        return self._held[key, units]


class FiledLevels:
    """In a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def has(self, key: Key, units: int) -> bool:
        return self._path(key, units).exists()

    def save(self, key: Key, units: int, level: Level) -> None:
        path = self._path(key, units)
        temporary = path.with_suffix(".tmp")
        save_file({n: tensor.cpu().contiguous() for n, tensor in level.tensors.items()}, temporary)
        sync_path(temporary)
        temporary.replace(path)
        sync_path(self._folder)

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        path = self._path(key, units)
        try:
            with safe_open(path, framework="pt", device=str(device)) as stored:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return Level(found["keep"], found["weight"], found.get("bias"))
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{path}: a level that the search made cannot be read ({error}); start again with "
                "--overwrite instead of --resume"
            ) from error

    def _path(self, key: Key, units: int) -> Path:
        return self._folder / f"{key[0]}.{key[1]}.{units}.safetensors"


def check_room(folder: Path, needed: int, done: Iterable[Path] = ()) -> None:
    """Refuse before anything is computed.

    Raises:
        InputError: the disk of `folder` has less than `needed` bytes, those of `done` aside.
    """
    have = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in done)
    if needed > have:
        raise InputError(
            f"{folder}: the levels of a search take {needed / 1e9:.1f} GB and {have / 1e9:.1f} GB "
            "are free; give --out on a larger disk, or an --allocation that does not search"
        )

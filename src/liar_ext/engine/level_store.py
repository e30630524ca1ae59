"""Levels: what a repair makes of each Site at a few widths, made once, read for every candidate.

ZipLM's database (arXiv 2302.04089). One file for each Site, written whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
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

    def has(self, key: Key) -> bool: ...

    def save(self, key: Key, levels: Mapping[int, Level]) -> None: ...

    def load(self, key: Key, units: int, device: torch.device) -> Level: ...


class HeldLevels:
    """In memory, where they were made."""

    def __init__(self) -> None:
        self._held: dict[Key, Mapping[int, Level]] = {}

    def has(self, key: Key) -> bool:
        return key in self._held

    def save(self, key: Key, levels: Mapping[int, Level]) -> None:
        self._held[key] = dict(levels)

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        return self._held[key][units]


class FiledLevels:
    """In a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def has(self, key: Key) -> bool:
        return self._path(key).exists()

    def save(self, key: Key, levels: Mapping[int, Level]) -> None:
        tensors = {
            f"{units}.{name}": tensor.cpu().contiguous()
            for units, level in levels.items()
            for name, tensor in level.tensors.items()
        }
        path = self._path(key)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        sync_path(temporary)
        temporary.replace(path)
        sync_path(self._folder)

    def load(self, key: Key, units: int, device: torch.device) -> Level:
        path = self._path(key)
        try:
            with safe_open(path, framework="pt", device=str(device)) as stored:
                known = set(stored.keys())
                keep, weight = (stored.get_tensor(f"{units}.{n}") for n in ("keep", "weight"))
                bias = stored.get_tensor(f"{units}.bias") if f"{units}.bias" in known else None
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: levels that the search made cannot be read ({error}); start again with "
                "--overwrite instead of --resume"
            ) from error
        return Level(keep, weight, bias)

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key[0]}.{key[1]}.safetensors"


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

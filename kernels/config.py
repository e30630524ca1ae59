"""Launch configurations of the product kernels, and which one a call gets.

They are committed in `configs/*.json`: one file for each architecture (`"architecture": 90`) with
what is known without running anything, and one for each device that the autotuner was run on
(`"device": "NVIDIA H200"`, its entries timed), which goes first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "configs"

KERNELS = ("pointer", "descriptor")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ProductConfig:
    """Launch parameters of a product kernel.

    Attributes:
        block: rows and columns of one output tile.
        block_t: tokens of one step.
        warps, stages: of the program and of its software pipeline.
        flush: steps after which the sum of the tensor cores is added to that of the registers.
        group: rows of tiles in a band of the tile list.
    """

    block: int
    block_t: int
    warps: int
    stages: int
    flush: int
    group: int = 8

    def __post_init__(self) -> None:
        for name, allowed in (
            ("block", (32, 64, 128, 256)),
            ("block_t", (16, 32, 64, 128)),
            ("warps", (4, 8)),
            ("stages", range(1, 9)),
            ("flush", range(1, 129)),
            ("group", range(1, 65)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                allowed = f"{allowed[0]}..{allowed[-1]}" if isinstance(allowed, range) else allowed
                raise ValueError(f"{name} must be one of {allowed}; got {value}")

    @property
    def flush_tokens(self) -> int:
        """Tokens in one uninterrupted tensor-core sum."""
        return self.flush * self.block_t


@dataclass(frozen=True)
class Entry:
    """A line of a configuration file.

    Attributes:
        kernel: one of `KERNELS`. dtype: one of `DTYPES`, that of x (float32 as three planes).
        max_columns: the entry is for matrices of at most so many columns; None for any.
        config: the launch parameters.
        timed: None, or what the autotuner measured: device, versions, columns, tokens, ms.
    """

    kernel: str
    dtype: str
    max_columns: int | None
    config: ProductConfig
    timed: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {self.kernel!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.max_columns is not None and self.max_columns < 1:
            raise ValueError(f"max_columns must be positive or null; got {self.max_columns}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "timed": self.timed or False}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        known = {field.name for field in fields(cls)}
        if data.keys() != known:
            raise ValueError(f"an entry has {sorted(known)}; got {sorted(data)}")
        timed = data["timed"] or None
        return cls(**{**data, "config": ProductConfig(**data["config"]), "timed": timed})


@dataclass(frozen=True)
class Table:
    """A configuration file: the entries of one architecture, or of one device."""

    entries: tuple[Entry, ...]
    architecture: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.architecture is None) == (self.device is None):
            raise ValueError("a table names an architecture or a device, one of the two")
        if self.device is not None and not all(entry.timed for entry in self.entries):
            raise ValueError(f"entries for {self.device} were not timed there")

    def find(self, kernel: str, dtype: str, columns: int) -> Entry | None:
        """The entry with the smallest fitting `max_columns`."""
        fitting = [
            entry
            for entry in self.entries
            if (entry.kernel, entry.dtype) == (kernel, dtype)
            and (entry.max_columns is None or columns <= entry.max_columns)
        ]
        return min(fitting, key=lambda entry: entry.max_columns or 2**31, default=None)


def read_table(path: Path) -> Table:
    """One file of `FOLDER`.

    Raises:
        ValueError: an unknown key, kernel, dtype or value; the message names the file.
    """
    try:
        data = json.loads(path.read_text())
        entries = tuple(Entry.from_json(entry) for entry in data.pop("entries"))
        return Table(entries, **data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


@lru_cache
def tables() -> tuple[Table, ...]:
    """All committed tables, read once."""
    return tuple(read_table(path) for path in sorted(FOLDER.glob("*.json")))


def config_for(
    kernel: str,
    dtype: str,
    columns: int,
    architecture: int,
    device: str | None = None,
    among: Iterable[Table] | None = None,
) -> ProductConfig:
    """The configuration timed on `device`, else that of the newest architecture not newer.

    The architecture's also where it is for a narrower class of sizes: what was timed for 4096
    columns says little about 64.

    Args:
        architecture: 90 for compute capability 9.0.
        among: tables to search, or None for the committed ones.
    Raises:
        ValueError: no table has one.
    """
    candidates = tuple(tables() if among is None else among)
    own = [table for table in candidates if table.device is not None and table.device == device]
    older = [table for table in candidates if (table.architecture or 10**6) <= architecture]
    older.sort(key=lambda table: -(table.architecture or 0))
    fitting = []
    for group in (own, older):
        entries = (table.find(kernel, dtype, columns) for table in group)
        fitting += [entry for entry in entries if entry is not None][:1]
    if fitting:
        return min(fitting, key=lambda entry: entry.max_columns or 2**31).config
    known = sorted(
        table.architecture
        for table in candidates
        if table.architecture is not None and table.find(kernel, dtype, columns)
    )
    raise ValueError(
        f"no configuration of the {kernel} kernel for {dtype} on compute capability "
        f"{architecture / 10:.1f}: there are some for {', '.join(f'{a / 10:.1f}' for a in known)}"
    )


def fastest_kernel(
    dtype: str, columns: int, device: str, among: Iterable[Table] | None = None
) -> str | None:
    """The kernel whose entry was timed to be the fastest on `device`; None if only one was."""
    for table in tables() if among is None else among:
        if table.device == device:
            entries = [table.find(kernel, dtype, columns) for kernel in KERNELS]
            timed = [entry for entry in entries if entry is not None and entry.timed]
            # of the same size, or their times do not compare
            if len(timed) == len(KERNELS) and len({entry.max_columns for entry in timed}) == 1:
                return min(timed, key=lambda entry: (entry.timed or {})["ms"]).kernel
    return None

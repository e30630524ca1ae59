"""Moments of the dense path on disk: further compressions of the same checkpoint, calibration and
arithmetic need no forward pass.

    FOLDER/moments.json                 version, and the fingerprint: all that the Moments depend on
    FOLDER/wanted.json                  Sites that other compressions will ask for, if anybody said
    FOLDER/layer-0003-ffn.safetensors   one Site

A Site's file is described in `moments_file`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from liar_ext.checkpoint.identity import opened
from liar_ext.checkpoint.journal import sync_path
from liar_ext.checkpoint.reader import SINGLE
from liar_ext.checkpoint.shards import ShardWriter, TensorDigest
from liar_ext.engine.moments_file import SiteFile, digest_begun, specs_of, write_moments
from liar_ext.errors import InputError
from liar_ext.ops.moments import ColumnMoments, Moments

VERSION = 1
FILE, WANTED = "moments.json", "wanted.json"
GRAM_DTYPES = (torch.float32, torch.float64)


class MomentsStore:
    """Moments of the dense path in a folder, one file for each Site.

    Several processes may open one folder and read; each Site is to be saved by one of them. What
    `has` and `load` find is what is on the disk at the time of the call.

    Args:
        folder: made if missing.
        fingerprint: JSON data; all that the Moments depend on: files of the checkpoint, tokens,
            how they are batched, compute dtype, device, versions.
    Raises:
        InputError: the folder was made for another fingerprint, is of another release, holds other
            things, or cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = Path(folder)
        text = json.dumps(fingerprint, sort_keys=True, allow_nan=False)
        self._fingerprint: dict[str, Any] = json.loads(text)
        self._seed = text
        self._claim()
        self._wanted = _read_wanted(self.folder / WANTED)

    def has(self, layer: int, kind: str) -> bool:
        """Whether a Site's Moments are there; `load` says whether they are sound."""
        return self._path(layer, kind).is_file()

    def complete(self, sites: Iterable[tuple[int, str]]) -> bool:
        """Whether the Moments of all these (layer, kind) are there."""
        return all(self.has(layer, kind) for layer, kind in sites)

    def wanted(self, layer: int) -> tuple[str, ...]:
        """Kinds of a layer that `ask` named: to be computed in passing when forwards run anyway."""
        return tuple(
            dict.fromkeys(
                kind
                for kinds, layers in self._wanted
                for kind in kinds
                if layers is None or layers[0] <= layer < layers[1]
            )
        )

    def save(
        self, layer: int, kind: str, moments: Moments, columns: ColumnMoments | None = None
    ) -> None:
        """Write a Site's Moments: complete and durable under their name, or not at all.

        Holds one block of the triangle beside the Moments, whatever their size.

        Args:
            columns: the column statistics of the same tokens: float64 sums of squares, where the
                diagonal of the Gram is float32.
        Raises:
            ValueError: not the whole triangle in the natural order, or a Gram of another dtype
                than float32 and float64.
            InputError: writing failed, the disk is full.
        """
        if not moments.complete or moments.order is not None:
            raise ValueError("only the whole triangle in the natural order is kept")
        if moments.gram.dtype not in GRAM_DTYPES:
            raise ValueError(f"the Gram matrix is {moments.gram.dtype}, not float32 or float64")
        # compact: the only element of a 1×1 diagonal keeps a stride that hides its bytes
        diagonal = torch.cat([moments.gram.diagonal()]).double()
        squares = diagonal if columns is None else columns.squares
        path = self._path(layer, kind)
        specs = specs_of(moments.columns, moments.gram.dtype)
        with self._writing(sum(spec.bytes for spec in specs)):
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=self.folder))
            try:
                # one file, however large: its space is reserved before anything is written
                writer = ShardWriter(temporary, specs, shard_bytes=sys.maxsize)
                try:
                    write_moments(writer, moments, squares, self._digest(layer, kind))
                    writer.finish()
                finally:
                    writer.close()
                os.replace(temporary / SINGLE, path)
                sync_path(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def load(self, layer: int, kind: str, device: torch.device | str = "cpu") -> Moments:
        """A Site's Moments, the bits that were saved; above the diagonal are zeros.

        Raises:
            InputError: they are not there, or the file is truncated or damaged; names the file.
        """
        with self._site_file(layer, kind) as file:
            count, total, _ = file.columns()
            gram = file.gram(total.numel(), device)
        return Moments(count.to(device), total.to(device), gram)

    def load_columns(
        self, layer: int, kind: str, device: torch.device | str = "cpu"
    ) -> ColumnMoments:
        """The column statistics of a Site's Moments, which is what criteria need; reads no Gram.

        Raises:
            InputError: as `load`.
        """
        with self._site_file(layer, kind) as file:
            count, total, squares = file.columns()
        return ColumnMoments(count.to(device), total.to(device), squares.to(device))

    @staticmethod
    def bytes_needed(columns: Iterable[int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the files of Sites with these numbers of columns, without their headers.

        A Site whose statistics were repeated in float64 has twice the Gram that float32 says.
        """
        return sum(spec.bytes for size in columns for spec in specs_of(size, dtype))

    @staticmethod
    def ask(folder: Path, wanted: Iterable[tuple[Sequence[str], tuple[int, int] | None]]) -> None:
        """Say which Sites compressions that share this folder will need, before the first opens it.

        Args:
            wanted: for each compression its kinds, and its half-open range of layers or None.
        Raises:
            InputError: the folder cannot be written.
        """
        entries = [{"target": list(kinds), "layers": layers} for kinds, layers in wanted]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / WANTED, {"version": VERSION, "sites": entries})
        except OSError as error:
            raise InputError(f"--moments {folder}: cannot be written ({error.strerror})") from error

    @staticmethod
    def delete(folder: Path) -> None:
        """Remove what stores write into a folder, and the folder if nothing else is in it."""
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.name in (FILE, WANTED) or path.match("layer-*.safetensors"):
                path.unlink(missing_ok=True)
            elif path.name.startswith((".layer-", ".moments-")):
                # of a process that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()

    def _path(self, layer: int, kind: str) -> Path:
        return self.folder / f"layer-{layer:04d}-{kind}.safetensors"

    def _digest(self, layer: int, kind: str) -> TensorDigest:
        return digest_begun(f"{self._seed}\n{layer} {kind}\n")

    @contextmanager
    def _site_file(self, layer: int, kind: str) -> Iterator[SiteFile]:
        path = self._path(layer, kind)
        if not path.is_file():
            raise InputError(f"{path}: missing; run again to compute it")
        with opened(path) as handle:
            yield SiteFile(path, handle, self._digest(layer, kind))

    @contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            need = f"; this Site needs {size:,} bytes" if error.errno == errno.ENOSPC else ""
            raise InputError(
                f"--moments {self.folder}: writing failed ({error.strerror}){need}; free space or "
                "give another folder"
            ) from error

    def _claim(self) -> None:
        """Write `moments.json`, or compare with the one that is there."""
        path = self.folder / FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                others = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
                others = sorted(set(others) - {FILE, WANTED})
                if others:
                    raise InputError(
                        f"--moments {self.folder}: holds {others[0]} and no {FILE}; give a new or "
                        "empty folder"
                    )
                data = {"version": VERSION, "fingerprint": self._fingerprint}
                _replace(path, data, keep=True)
        except OSError as error:
            raise InputError(
                f"--moments {self.folder}: cannot be written ({error.strerror}); give another "
                "folder"
            ) from error
        self._compare(path)

    def _compare(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete {self.folder}") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise InputError(
                f"{path}: version {version!r}; this release reads {VERSION}: give another folder, "
                f"or delete {self.folder}"
            )
        here, there = _flat(self._fingerprint), _flat(data.get("fingerprint"))
        for key in [*here, *(key for key in there if key not in here)]:
            mine, its = here.get(key, "absent"), there.get(key, "absent")
            if mine != its:
                raise InputError(
                    f"--moments {self.folder}: made with {key} {_short(its)}, this run has "
                    f"{_short(mine)}; give another folder, or delete this one"
                )


def _replace(path: Path, data: Any, *, keep: bool = False) -> None:
    """Write JSON whole or not at all; `keep`: not where another process was first."""
    temporary = path.with_name(f".moments-{uuid.uuid4().hex}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            if keep:
                os.link(temporary, path)
            else:
                temporary.replace(path)
        except FileExistsError:
            return
        except OSError:
            temporary.replace(path)  # a file system without links
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _read_wanted(path: Path) -> list[tuple[list[str], list[int] | None]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [(entry["target"], entry["layers"]) for entry in data["sites"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it") from error


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, so that a message can name one value."""
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

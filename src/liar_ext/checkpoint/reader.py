"""Read a Hugging Face folder tensor by tensor, read-only, with everything checked up front."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.checkpoint.dtypes import DTYPES, TORCH_DTYPES
from liar_ext.checkpoint.identity import (
    FileHasher,
    FileIdentity,
    check_unchanged,
    opened,
    read_into,
)
from liar_ext.checkpoint.matching import KeptLayers, left_over, matched, tied_names
from liar_ext.errors import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PIECE_BYTES = 64 * 1024**2


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        InputError: there is none; it names the file, what is wrong with it, and what to do.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; {path.parent} is not a complete checkpoint: complete the download, "
            "or give the folder that has this file"
        ) from error
    except PermissionError as error:
        raise InputError(
            f"{path}: permission denied; run as a user who may read it, or chmod it and the "
            "folders above"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({error}); download it again, or mend it there"
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: must hold a JSON object, not {type(data).__name__}; download it again"
        )
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder, of which the family of models is known.

    Raises:
        InputError: as `read_json`, or it is of something else.
    """
    path = folder / CONFIG
    data = read_json(path)
    given = data.get("model_type")
    if not isinstance(given, str):
        what = "no model_type" if given is None else f"model_type {given!r} is no name"
        raise InputError(
            f"{path}: {what}, so this is not a transformers model; give a folder that "
            "save_pretrained or liar-ext wrote"
        )
    return data


class _Stored(NamedTuple):
    """A tensor in a file: dtype as safetensors names it, and bytes from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class CheckpointReader:
    """The tensors of a folder's safetensors files.

    Nothing is mapped into memory and no file stays open: pages of a mapping count as resident, so
    a checkpoint read through one grows the process to its own size. Every read checks that the
    file is still the one that was validated here.

    Attributes:
        folder: the checkpoint; config: its `config.json`.
    Raises:
        InputError: no or truncated or corrupt safetensors, an index that names what is not there,
            only pickle files, or files that may not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._files: dict[str, FileIdentity] = {}
        self._headers: dict[str, dict[str, _Stored]] = {}
        self._stored: dict[str, _Stored] = {}
        self._hasher: FileHasher | None = None
        index = folder / INDEX
        # the order in which transformers looks, for folders that have both
        if (folder / SINGLE).exists():
            self._stored = dict(self._header(SINGLE))
        elif index.exists():
            self._read_index(index)
        else:
            raise InputError(_nothing_to_read(folder))
        self._names: dict[str, str] = {}
        self._layers: KeptLayers | None = None
        # of the model with all layers, where it was bound before
        self._whole: dict[str, str] = {}

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: no weight_map; download the index again")
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise InputError(f"{index}: {name} is in {file!r}, which is no file name")
            if file not in self._files and not (self.folder / file).exists():
                raise InputError(f"{self.folder / file}: missing; {INDEX} names it")
            if name not in self._header(file):
                raise InputError(f"{self.folder / file}: has no tensor {name}, but {INDEX} says so")
            self._stored[name] = self._header(file)[name]

    def _header(self, file: str) -> dict[str, _Stored]:
        """The tensors of a file, which safetensors itself has found to be sound."""
        if file in self._headers:
            return self._headers[file]
        path = self.folder / file
        with opened(path) as handle:
            identity = FileIdentity.of(handle)
            try:
                # "np" maps the file read-only; "pt" would reserve its size in writable memory
                with safe_open(path, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: truncated or corrupt safetensors file ({error}); download it again"
                ) from error
            length = bytearray(8)
            read_into(path, handle, memoryview(length), 0)
            text = bytearray(int.from_bytes(length, "little"))
            read_into(path, handle, memoryview(text), 8)
        with opened(path, identity):
            pass  # safetensors opened the path, not this handle
        start = 8 + len(text)
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        self._files[file] = identity
        self._headers[file] = {
            name: _Stored(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
        return self._headers[file]

    def keep_layers(self, path: str, kept: Sequence[int]) -> None:
        """Be the checkpoint of a model of these layers, from `bind` on.

        Names that only transformers' own rules explain, as of nested models, are known if the
        model of the files was bound before.

        Args:
            path: of the list of layers in the model; kept: for each layer of that model, its index
                in the files.
        """
        if self._layers is None:
            self._whole = self._names
        self._layers = KeptLayers(path, tuple(kept))
        self._names = {}

    def bind(self, model: PreTrainedModel) -> list[str]:
        """Match the files to the parameters and persistent buffers of an (empty) model.

        Returns:
            tensors of the files that the model does not have.
        Raises:
            InputError: a tensor is missing or its shape contradicts the config.
        """
        shapes = {name: entry.shape for name, entry in self._stored.items()}
        self._names |= matched(model, shapes, self.folder, kept=self._layers, whole=self._whole)
        self._untie(model, tied_names(model))
        return left_over(model, shapes, self._names.values(), self._layers)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str, *, pin: bool = False) -> Tensor:
        """The tensor of a model parameter, in CPU memory of its own and the file's dtype.

        Args:
            pin: in page-locked memory, where there is CUDA to copy it to.
        Raises:
            InputError: the file was replaced, changed or truncated since this reader was made, or
                cannot be read; or torch has no such dtype.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        pin = pin and torch.cuda.is_available()
        tensor = torch.empty(entry.shape, dtype=dtype, pin_memory=pin)
        path = self.folder / entry.file
        with opened(path, self._files[entry.file]) as handle:
            read_into(path, handle, raw_bytes(tensor), entry.begin)
            check_unchanged(path, handle, self._files[entry.file])
        return tensor

    def pieces(self, name: str, limit: int = PIECE_BYTES) -> Iterator[Tensor]:
        """The elements of a model parameter as flat tensors of at most `limit` bytes, in order.

        Each is memory of its own, so copying an embedding from file to file holds one piece. A
        tensor without elements has no pieces.

        Raises:
            InputError: as `get`, whenever the next piece is asked for.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        path, identity = self.folder / entry.file, self._files[entry.file]
        step = max(limit // dtype.itemsize, 1) * dtype.itemsize
        with opened(path, identity) as handle:
            for begin in range(entry.begin, entry.end, step):
                size = min(step, entry.end - begin) // dtype.itemsize
                piece = torch.empty(size, dtype=dtype)
                read_into(path, handle, raw_bytes(piece), begin)
                check_unchanged(path, handle, identity)
                yield piece

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a model parameter."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a model parameter in the file.

        Raises:
            InputError: torch has none, as for packed 4-bit floats.
        """
        entry = self._entry(name)
        if entry.dtype not in TORCH_DTYPES:
            raise InputError(
                f"{self.folder / entry.file}: {self._names[name]} is {entry.dtype}, quantised; "
                "prune the original first, then quantise"
            )
        return TORCH_DTYPES[entry.dtype]

    def dtypes(self) -> dict[str, str]:
        """The dtype of each model parameter as safetensors names it (`BF16`)."""
        return {name: self._stored[own].dtype for name, own in self._names.items()}

    def main_dtype(self) -> torch.dtype:
        """The floating dtype most parameters have: layers run in one dtype.

        Raises:
            InputError: none is a float, so the weights are quantised.
        """
        counts = Counter(DTYPES[name] for name in self.dtypes().values() if name in DTYPES)
        if not counts:
            raise InputError(
                f"{self.folder}: no float tensors; quantised weights are not supported"
            )
        return counts.most_common(1)[0][0]

    def _untie(self, model: PreTrainedModel, tied: Mapping[str, str]) -> None:
        """What is stored beside what the config ties it to, with other values, is itself, as
        transformers takes it (T5 1.1, whose config has no other way to say it)."""
        own = {
            name
            for name, source in tied.items()
            if name in self._names and source in self._names and self._differ(name, source)
        }
        for name in own:
            model.all_tied_weights_keys.pop(name)

    def _differ(self, name: str, other: str) -> bool:
        one, two = (self._stored[self._names[n]] for n in (name, other))
        if one is two or (one.dtype, one.shape) != (two.dtype, two.shape):
            return one is not two
        return any(
            not torch.equal(a, b)
            for a, b in zip(self.pieces(name), self.pieces(other), strict=True)
        )

    def bytes(self) -> int:
        """Bytes of the tensors that belong to the model."""
        entries = [self._stored[own] for own in set(self._names.values())]
        return sum(entry.end - entry.begin for entry in entries)

    def files(self) -> tuple[str, ...]:
        """The names of the weight files, sorted."""
        return tuple(sorted(self._files))

    def sizes(self) -> dict[str, dict[str, int]]:
        """`size` in bytes and `mtime_ns` of each weight file, as they were when it was opened."""
        return {
            file: {"size": self._files[file].size, "mtime_ns": self._files[file].mtime_ns}
            for file in self.files()
        }

    def start_hashing(self, threads: int = 1) -> None:
        """Begin to compute `hashes` in the background; nothing if that has begun already."""
        self._hashing(threads)

    def hashes(self) -> dict[str, str]:
        """The sha256 of each weight file, begun now unless `start_hashing` was called; waits.

        It is the sum of the whole file, header included: what the hub shows for a file in LFS and
        what `sha256sum` prints.

        Raises:
            InputError: a file cannot be read, or is not the one that was read any more.
            RuntimeError: `stop_hashing` was called meanwhile.
        """
        sums = self._hashing(1).wait()
        return {file: sums[self.folder / file] for file in self.files()}

    def hashed(self) -> bool:
        """Whether `hashes` would return, or raise, at once."""
        return self._hasher is not None and self._hasher.over()

    def stop_hashing(self) -> None:
        """Give up `hashes`; returns at once. `start_hashing` begins from the start again."""
        if self._hasher is not None:
            self._hasher.stop()
            self._hasher = None

    def _hashing(self, threads: int) -> FileHasher:
        hasher = self._hasher
        if hasher is None:
            files = {self.folder / file: self._files[file] for file in self.files()}
            hasher = self._hasher = FileHasher(files, threads)
        return hasher

    def _entry(self, name: str) -> _Stored:
        return self._stored[self._names[name]]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, to read into or to write from."""
    flat = tensor.detach().view(-1)
    if flat.stride(0) != 1:
        # one element of any stride is contiguous to torch, and no array of bytes
        flat = flat.clone(memory_format=torch.contiguous_format).as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def left_over_warnings(left_over: Sequence[str], model: PreTrainedModel) -> list[str]:
    """What to say of the tensors that `CheckpointReader.bind` gives back; nothing of none."""
    if not left_over:
        return []
    return [
        f"{len(left_over)} tensors of the source are no part of {type(model).__name__} and were "
        f"left out, first {left_over[0]}"
    ]


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters of a model, what is tied once; on `meta` it is there twice."""
    tied = tied_names(model)
    return sum(value.numel() for name, value in model.named_parameters() if name not in tied)


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if not pickles:
        return f"{folder}: neither {SINGLE} nor {INDEX}; give a folder with safetensors weights"
    return (
        f"{folder}: only pickle weights ({pickles[0]}), which can run code when loaded and are "
        "refused; if you trust them, convert once with AutoModel.from_pretrained(DIR)"
        ".save_pretrained(NEW) in a sandbox (torch loads them with weights_only=True)"
    )

"""Records of files and data sets, as objects: what text and multiple-choice sets are read from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError

# a spec that ends so is meant as a path
_SUFFIXES = (
    *(".txt", ".jsonl", ".csv", ".npy", ".safetensors", ".json", ".tsv", ".parquet", ".arrow"),
    *(".gz", ".zst", ".zip", ".pt", ".bin", ".pkl"),
)
# what the package `datasets` calls the readers of single files
DATA_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def looks_like_path(spec: str) -> bool:
    """Whether a spec is meant as a path, be it there or not."""
    # a hub id is NAME or OWNER/NAME: it starts with none of these
    return spec.startswith((".", "/", "~")) or spec.lower().endswith(_SUFFIXES)


def dataset_parts(spec: str, parts: Sequence[str]) -> list[str]:
    """`NAME[:CONFIG][:SPLIT]...` cut at the colons: the name, then one value for each of `parts`,
    empty where none is given. The name of a folder may have colons of its own.

    Raises:
        InputError: it is meant as a path that is not there, or has more parts.
    """
    whole = Path(spec).expanduser()
    name, *given = [spec] if whole.is_dir() else spec.split(":")
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"{spec}: a file takes no ':' parts; give {name}")
    if not path.exists() and (looks_like_path(name) or looks_like_path(spec)):
        raise InputError(f"{spec}: no such file or folder; check the path")
    if not name or len(given) > len(parts):
        form = "".join(f"[:{part}]" for part in parts)
        raise InputError(f"{spec!r} is not a source; give a file or NAME{form}")
    return [name, *given, *[""] * (len(parts) - len(given))]


def read_bytes(spec: str, path: Path) -> bytes:
    """A whole file; raises InputError with the system's reason."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{spec}: cannot be read ({reason}); check the path") from error


def decode(spec: str, raw: bytes) -> str:
    """UTF-8 text; raises InputError with the line of the first byte that is none."""
    try:
        # a byte order mark is not text
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{spec}: line {line}: byte 0x{raw[error.start]:02x} is not valid UTF-8; "
            "convert the file to UTF-8"
        ) from error


def json_records(spec: str, text: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON Lines text, each with where it stands; blank lines are skipped.

    Raises:
        InputError: a line is not JSON.
    """
    # split at "\n" alone: str.splitlines also cuts at U+2028, which JSON strings may contain
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{spec}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(
                f"{where}: not valid JSON ({reason}); give one object a line"
            ) from error
        yield where, record


def dataset_records(
    spec: str, name: str, config: str, split: str, *, instead: str
) -> Iterator[Any]:
    """Stream the records of a data set: `load_from_disk` folders, data folders and hub names.

    Args:
        spec: what the user gave; instead: what else could be given, for messages.
    Raises:
        InputError: there is no such data set, it is the folder of a model, or the package
            `datasets` is missing.
    """
    path = Path(name).expanduser()
    local = path if path.is_dir() else None
    if local is not None and not _saved_to_disk(local) and (why := _model_in(local)):
        # the package would take its JSON files for records
        raise InputError(
            f"{spec}: the folder of a model ({why}), and no data set; give {instead}, or a folder "
            "with data files"
        )
    datasets = _package(spec, instead)
    try:
        if local is not None and _saved_to_disk(local):
            saved = datasets.load_from_disk(str(local))
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise ValueError(f"no split {split!r}, available: {', '.join(saved)}")
                saved = saved[split]
            yield from saved
            return
        source = name if local is None else str(local)
        yield from datasets.load_dataset(source, config or None, split=split, streaming=True)
    except Exception as error:
        # the package raises many types for a missing, unreachable or malformed data set
        what = "a folder that cannot be read as" if local else "neither an existing path nor"
        raise InputError(
            f"{spec}: {what} a data set ({one_line(error)}); check the name or give a file"
        ) from error


def data_file_records(spec: str, path: Path, *, instead: str) -> Iterator[Any]:
    """Stream the records of one file of `DATA_FILES`.

    Raises:
        InputError: the file is damaged, or the package `datasets` is missing.
    """
    datasets = _package(spec, instead)
    reader = DATA_FILES[path.suffix.lower()]
    try:
        yield from datasets.load_dataset(
            reader, data_files=str(path), split="train", streaming=True
        )
    except Exception as error:
        raise InputError(f"{spec}: cannot be read as {reader} ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """An error's message, short."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _package(spec: str, instead: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{spec}: reading a data set needs the package 'datasets'; "
            f"install it (pip install datasets) or give {instead}"
        ) from error
    return datasets


def _model_in(folder: Path) -> str | None:
    """What says that a folder is that of a model; None where nothing does."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and "model_type" in config:
        return f"config.json has model_type {config['model_type']!r}"
    # model, model-00001-of-00002, adapter_model, ...: tokens of one's own have another name
    weights = min(folder.glob("*model*.safetensors"), default=None)
    return None if weights is None else f"it has {weights.name}"


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()

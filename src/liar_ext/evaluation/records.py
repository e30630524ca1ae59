"""Records of evaluation sets: of files in their own formats, and of data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liar_ext.calibration.records import (
    DATA_FILES,
    data_file_records,
    dataset_parts,
    dataset_records,
    decode,
    read_bytes,
)
from liar_ext.errors import InputError

# each record with where it stands, for messages
Records = Iterator[tuple[str, Any]]
Reader = Callable[[str, str], Records]


def open_records(
    spec: str, readers: Mapping[str, Reader], split: str, instead: str
) -> tuple[Records, Callable[[], str]]:
    """The records of a source, and what gives their digest once they are read.

    Args:
        spec: a file, or `NAME[:CONFIG][:SPLIT]`, a data set for the package `datasets`.
        readers: by suffix of a file of text: what takes the spec and the text. `.parquet` and
            `.arrow` are read beside these.
        split: of a data set where none is named; instead: what else could be given.
    Raises:
        InputError: there is no such source, or a file of that suffix cannot be read; from the
            records, they are malformed.
    """
    path = Path(spec).expanduser()
    if spec and path.is_file():
        suffix = path.suffix.lower()
        if suffix not in (*readers, *DATA_FILES):
            readable = ", ".join((*readers, *DATA_FILES))
            raise InputError(
                f"{spec}: cannot read a {suffix or 'suffixless'} file; give {readable}"
            )
        raw = read_bytes(spec, path)
        digest = hashlib.sha256(raw)
        if suffix in readers:
            return readers[suffix](spec, decode(spec, raw)), digest.hexdigest
        found = data_file_records(spec, path, instead=instead)
        return _numbered(spec, found), digest.hexdigest
    name, config, asked = dataset_parts(spec, ("CONFIG", "SPLIT"))
    digest = hashlib.sha256()
    records = dataset_records(spec, name, config, asked or split, instead=instead)
    return _hashed(_numbered(spec, records), digest.update), digest.hexdigest


def _numbered(spec: str, records: Iterable[Any]) -> Records:
    for number, data in enumerate(records, 1):
        yield f"{spec}: record {number}", data


def _hashed(records: Records, update: Callable[[bytes], None]) -> Records:
    for where, data in records:
        # a newline separates: JSON has none inside
        update(json.dumps(data, sort_keys=True, default=str).encode() + b"\n")
        yield where, data

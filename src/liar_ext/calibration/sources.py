"""Where calibration and evaluation text comes from: one `read(spec)` for files and data sets.

Local files come first and need no network: a spec that looks like a path is never taken for the
name of a data set on the hub, because a mistyped path that starts a download (or fails with a
connection error) is the most common complaint about calibration options.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from liar_ext.calibration.records import (
    dataset_parts,
    dataset_records,
    decode,
    json_records,
    looks_like_path,
    one_line,
    read_bytes,
)
from liar_ext.errors import InputError

Kind = Literal["text", "jsonl", "csv", "tokens", "dataset"]

# fields of what is read and of what is written of it; and what is between two fields so named
PAIR, PAIR_SIGN = ("source", "target"), ">"
READABLE = (".txt", ".jsonl", ".csv", ".npy", ".safetensors")


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Token ids that need no tokenizer.

    Attributes:
        input_ids: (n,) int64 for one stream, or (windows, t) int64.
        attention_mask: (windows, t) bool, True for valid tokens; None when every token is valid.
    Raises:
        InputError: not 1-D or 2-D, empty, a negative id, or a mask of another shape or without
            any valid token in some window.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.dim() not in (1, 2) or ids.numel() == 0:
            raise InputError(
                f"token ids have shape {tuple(ids.shape)}; "
                "give a non-empty 1-D stream or 2-D array of windows"
            )
        if int(ids.min()) < 0:
            raise InputError(f"token id {int(ids.min())} is negative; token ids start at 0")
        if mask is None:
            return
        if ids.dim() != 2 or mask.shape != ids.shape:
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; "
                "a mask needs 2-D windows of its own shape"
            )
        empty = (~mask.any(1)).nonzero().flatten()
        if empty.numel():
            raise InputError(f"window {int(empty[0])} has no valid token; remove it from the file")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text, or token ids, as read from one source.

    Attributes:
        name: the spec as the user gave it.
        kind: which reader made it.
        sha256: hex digest of the file's bytes; for a data set, of the documents that were read.
        documents: the texts, in order, without the blank ones; empty for token ids.
        tokens: the token ids, or None for text.
        complete: False when only the beginning of a data set was read.
        pairs: what an encoder-decoder reads and what it writes of it, where the source says which
            is which; odd: where a record is no pair, and others are.
    """

    name: str
    kind: Kind
    sha256: str
    documents: tuple[str, ...] = ()
    tokens: TokenIds | None = None
    complete: bool = True
    pairs: tuple[tuple[str, str], ...] = ()
    odd: str = ""

    def __post_init__(self) -> None:
        if (self.tokens is None) != bool(self.documents):
            raise InputError(f"{self.name}: no text found; give a source with text or token ids")

    def sentences(self) -> tuple[str, ...]:
        """The documents as an encoder's samples: a `.txt` gives one for each non-blank line."""
        if self.kind != "text":
            return self.documents
        return tuple(
            line.strip() for text in self.documents for line in text.split("\n") if line.strip()
        )


def read(spec: str, *, max_characters: int = 50_000_000) -> Corpus:
    """Read a corpus.

    Args:
        spec: one of
            `FILE.txt` (one document);
            `FILE.jsonl` (per line: field `text`, else `source` and `target`, else `sentence1` and
            `sentence2`, else the only string field);
            `FILE.csv` (STS-B layout: sentence1,sentence2,score; RFC 4180, no header; each value of
            a column that is not numeric is a document);
            `FILE.npy` (1-D stream or 2-D windows of integers);
            `FILE.safetensors` (`input_ids` and optionally `attention_mask`; others are ignored);
            `NAME[:CONFIG][:SPLIT][:FIELD]`, a data set for the package `datasets`: a hub name or a
            local folder. An empty part keeps its default: split `train`, field as for `.jsonl`;
            `SOURCE>TARGET` names the two fields of a pair.
        max_characters: a data set is streamed until this many characters are read, so that a large
            one is never downloaded whole; `Corpus.complete` tells. Files are always read whole.
    Raises:
        InputError: the source is missing, malformed or without text.
    """
    if not spec:
        raise InputError(f"the source is empty; give {_either()}, or a data set")
    whole = Path(spec).expanduser()
    if whole.is_file():
        return _read_file(spec, whole)
    name, config, split, field = dataset_parts(spec, ("CONFIG", "SPLIT", "FIELD"))
    instead = f"a {_either()} file"
    records = dataset_records(spec, name, config, split or "train", instead=instead)
    return _read_dataset(spec, records, field, max_characters)


def refuse_missing_path(spec: str) -> None:
    """Raise InputError for a spec that is meant as a path and is not there; reads nothing."""
    if not Path(spec).expanduser().exists() and looks_like_path(spec):
        raise InputError(f"{spec}: no such file or folder; check the path")


def csv_rows(path: str | Path, raw: bytes | None = None) -> list[tuple[int, list[str]]]:
    """The rows of a headerless RFC 4180 file as (number of the row's last line, values).

    Args:
        raw: its bytes, where they were read already.
    Raises:
        InputError: unreadable, badly quoted, or with rows of different lengths.
    """
    path = Path(path).expanduser()
    raw = read_bytes(str(path), path) if raw is None else raw
    return _csv_rows(str(path), decode(str(path), raw))


def _read_file(spec: str, path: Path) -> Corpus:
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise InputError(f"{spec}: cannot read a {suffix or 'suffixless'} file; give {_either()}")
    raw = read_bytes(spec, path)
    digest = hashlib.sha256(raw).hexdigest()
    if not raw:
        raise InputError(f"{spec}: the file is empty; give one with text or token ids")
    if suffix in (".npy", ".safetensors"):
        tokens = _npy(spec, raw) if suffix == ".npy" else _safetensors(spec, raw)
        return Corpus(spec, "tokens", digest, tokens=tokens)
    text = decode(spec, raw)
    if suffix == ".txt":
        return Corpus(spec, "text", digest, _present([text]))
    if suffix == ".jsonl":
        found = [_record(where, record) for where, record in json_records(spec, text)]
        texts = [text for record in found for text in record.texts]
        return Corpus(spec, "jsonl", digest, _present(texts), **_pairs(found))
    return Corpus(spec, "csv", digest, _present(_csv_texts(spec, text)))


def _either() -> str:
    return ", ".join(READABLE[:-1]) + f" or {READABLE[-1]}"


def _present(texts: list[str]) -> tuple[str, ...]:
    return tuple(text for text in texts if text.strip())


class _Record(NamedTuple):
    """The texts of one record; pair: what is read, and what is written of it, if it is one."""

    where: str
    texts: list[str]
    pair: tuple[str, str] | None


def _pairs(records: Sequence[_Record]) -> dict[str, Any]:
    """Fields of a Corpus: the pairs, those with a blank side left out, where all records are some;
    where only others are, the first that is none."""
    odd = [record.where for record in records if record.pair is None]
    if odd:
        return {"odd": odd[0]} if len(odd) < len(records) else {}
    pairs = [record.pair for record in records if record.pair is not None]
    return {"pairs": tuple(pair for pair in pairs if all(map(str.strip, pair)))}


def _record(where: str, record: Any, field: str = "") -> _Record:
    """`field` (`SOURCE>TARGET` are two), else `text`, else `source` and `target`, else a sentence
    pair, else the only string."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with a field 'text', got {record!r:.40}")
    strings = [key for key, value in record.items() if isinstance(value, str)]
    sides: list[str] = []
    if PAIR_SIGN in field:
        sides = field.split(PAIR_SIGN, 1)
    elif not field and set(PAIR) <= set(strings):
        sides = list(PAIR)
    if field:
        names = sides or [field]
    elif "text" in record:
        names = ["text"]
    elif sides:
        names = sides
    elif "sentence1" in record and "sentence2" in record:
        names = ["sentence1", "sentence2"]
    else:
        names = strings
    found = f"found {', '.join(map(str, record)) or 'none'}"
    if not names or (names is strings and len(strings) > 1):
        raise InputError(f"{where}: no field 'text' and not exactly one string field ({found})")
    for name in dict.fromkeys([*names, *sides]):
        if name not in strings:
            state = "is not a string" if name in record else f"is missing ({found})"
            raise InputError(f"{where}: field {name!r} {state}; every record needs it as a string")
        try:
            record[name].encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: field {name!r} has an unpaired surrogate; remove it"
            ) from None
    pair = (record[sides[0]], record[sides[1]]) if sides else None
    return _Record(where, [record[name] for name in names], pair)


def _csv_rows(spec: str, text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if not row:
                continue
            if rows and len(row) != len(rows[0][1]):
                raise InputError(
                    f"{spec}: line {reader.line_num}: {len(row)} columns where the first row has "
                    f"{len(rows[0][1])}; quote values that contain commas"
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(
            f"{spec}: line {reader.line_num}: not valid CSV ({error}); quote values as in RFC 4180"
        ) from error
    if not rows:
        raise InputError(f"{spec}: no rows; give lines of sentence1,sentence2,score")
    return rows


def _csv_texts(spec: str, text: str) -> list[str]:
    rows = _csv_rows(spec, text)
    columns = []
    for index in range(len(rows[0][1])):
        numeric = [is_number(row[index]) for _, row in rows]
        if len(rows) > 1 and not numeric[0] and all(numeric[1:]):
            raise InputError(
                f"{spec}: line 1 looks like a header ({rows[0][1][index]!r} above numbers); "
                "remove it"
            )
        if not all(numeric):
            columns.append(index)
    if not columns:
        raise InputError(f"{spec}: every column is numeric; give a file with text")
    return [row[index] for _, row in rows for index in columns]


def is_number(value: str) -> bool:
    """True when `value` parses as a float."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def _npy(spec: str, raw: bytes) -> TokenIds:
    try:
        # never unpickle: a calibration file must not be able to run code
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{spec}: not a .npy file of integers ({one_line(error)}); save it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", "an archive")
        raise InputError(f"{spec}: holds {kind}, not integers; save token ids as int32 or int64")
    # uint64 above 2**63 turns negative here and is refused as such
    return _token_ids(spec, torch.from_numpy(array.astype(np.int64)), None)


def _safetensors(spec: str, raw: bytes) -> TokenIds:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{spec}: not a safetensors file ({one_line(error)})") from error
    if "input_ids" not in tensors:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise InputError(f"{spec}: has no tensor 'input_ids' (found {found}); add it")
    mask = tensors.get("attention_mask")
    for name in ("input_ids", "attention_mask"):
        tensor = tensors.get(name)
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            raise InputError(f"{spec}: {name} is {tensor.dtype}; save it as integers")
    return _token_ids(spec, tensors["input_ids"].long(), None if mask is None else mask.bool())


def _token_ids(spec: str, ids: Tensor, mask: Tensor | None) -> TokenIds:
    try:
        return TokenIds(ids, mask)
    except InputError as error:
        raise InputError(f"{spec}: {error}") from None


def _read_dataset(spec: str, records: Iterator[Any], field: str, max_characters: int) -> Corpus:
    documents: list[str] = []
    found: list[_Record] = []
    digest = hashlib.sha256()
    characters, complete = 0, True
    for number, record in enumerate(records, 1):
        if characters >= max_characters:
            complete = False
            break
        found.append(_record(f"{spec}: record {number}", record, field))
        for text in _present(found[-1].texts):
            documents.append(text)
            characters += len(text)
            # the separator keeps ("ab", "c") and ("a", "bc") apart
            digest.update(text.encode() + b"\0")
    return Corpus(
        spec,
        "dataset",
        digest.hexdigest(),
        tuple(documents),
        complete=complete,
        **_pairs(found),
    )

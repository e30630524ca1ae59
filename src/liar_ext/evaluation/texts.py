r"""Texts that a perplexity is of, made into one stream of tokens as the field does it.

Published numbers differ by how the pieces of a data set are joined, so that has a name:

plain        the file as it is; a data set's documents joined by "\n\n"
wikitext2    lines of WikiText-2, each with its line end and empty where it is blank, joined by
             "\n\n" (GPTQ, SparseGPT, Wanda, LLM-Pruner, SliceGPT)
ptb          lines of the Penn Treebank without white space around them, joined by " " (GPTQ's
             `ptb-new`, SparseGPT, Wanda)
ptb-lines    the same joined by "\n\n" (GPTQ's first `ptb`; LLM-Pruner, on the validation split)
c4           the first 1,100 documents of C4's first validation shard, joined by " "; of the tokens
             the first 256 windows (GPTQ's `c4-new`, SparseGPT, Wanda)
c4-sampled   256 times a document of that shard with more tokens than a window, and a window
             anywhere in it, by Python's `random` seeded with 0 (GPTQ's first `c4`)

The joined text is tokenised in one call with the special tokens that the tokenizer adds by itself,
so a LLaMA stream begins with one BOS and later windows have none. For `c4-sampled` that is true of
each document. The rules are those of `datautils.py` in the repositories of the papers.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liar_ext.calibration.batches import encode
from liar_ext.calibration.records import (
    DATA_FILES,
    data_file_records,
    dataset_parts,
    dataset_records,
    decode,
    read_bytes,
)
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError
from liar_ext.evaluation.text_names import Protocol, protocol_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JSON = (".json", ".jsonl")
_INSTEAD = "a local file"
# documents in which no window fits, in a row, before a shard is given up
_ATTEMPTS = 10_000


@dataclass(frozen=True, eq=False)
class Text:
    """A text as it was read.

    Attributes:
        name: the spec as the user gave it.
        protocol: how the documents become tokens.
        documents: in order.
        sha256: hex digest of the file's bytes; of a data set, of the documents that were read.
    """

    name: str
    protocol: Protocol
    documents: tuple[str, ...]
    sha256: str

    def corpus(self) -> Corpus:
        """The texts, for `calibration.overlap`."""
        present = tuple(document for document in self.documents if document.strip())
        return Corpus(self.name, "text", self.sha256, present)

    def describe(self, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The protocol as JSON data: all that says how the tokens `ids` came about."""
        one, both = (encode("a", tokenizer, special=special) for special in (False, True))
        front = _position(both, one)
        return {
            "name": self.protocol.name,
            "join": self.protocol.join,
            "documents": len(self.documents),
            "windows": "non-overlapping, of the stream; a last partial one is dropped",
            "special_tokens": {
                "of": "each document" if self.protocol.sampled else "the whole text",
                "in_front": both[:front],
                "behind": both[front + len(one) :],
            },
            "stream_tokens": ids.numel(),
        }


def read_text(spec: str) -> Text:
    """Read an evaluation text.

    Args:
        spec: `FILE` (UTF-8, any suffix), `PROTOCOL=SOURCE`, or `PROTOCOL` alone, which is the
            hub's data set. SOURCE is a file in the data set's own format (lines of text; for C4 and
            `plain` also `.json`, `.jsonl`, their `.gz`; `.parquet`, `.arrow`) or
            `NAME[:CONFIG][:SPLIT]`, a hub name or a local folder.
    Raises:
        InputError: there is no such source, or it is damaged or without text.
    """
    protocol, source = protocol_of(spec)
    path = Path(source).expanduser()
    if path.is_file():
        raw = read_bytes(source, path)
        if not raw:
            raise InputError(f"{source}: the file is empty; give one with text")
        documents = tuple(_limited(protocol, _documents(source, path, raw, protocol)))
        digest = hashlib.sha256(raw).hexdigest()
    else:
        name, config, split = dataset_parts(source, ("CONFIG", "SPLIT"))
        records = dataset_records(source, name, config, split or protocol.split, instead=_INSTEAD)
        if protocol.sampled:
            raise InputError(
                f"{spec}: draws from all documents of one shard; give it as a local file"
            )
        texts = _fields(source, records, protocol.field)
        documents = tuple(_limited(protocol, map(protocol.piece, texts)))
        hashed = hashlib.sha256()
        for document in documents:
            hashed.update(document.encode() + b"\0")
        digest = hashed.hexdigest()
    if not any(document.strip() for document in documents):
        raise InputError(f"{source}: no text found; give a source with text")
    return Text(spec, protocol, documents, digest)


def tokens_of(text: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Tensor:
    """The stream of tokens that is cut into windows of `seq_len`, (n,) int64.

    Raises:
        InputError: `c4-sampled` found no document that is longer than a window.
    """
    protocol = text.protocol
    if protocol.sampled:
        return _sampled(text, tokenizer, seq_len)
    joined = protocol.join.join(text.documents)
    ids = torch.tensor(encode(joined, tokenizer, special=True), dtype=torch.int64)
    return ids if protocol.windows is None else ids[: protocol.windows * seq_len]


def _sampled(text: Text, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Tensor:
    """GPTQ's windows of C4, each from a document of its own."""
    assert text.protocol.windows is not None
    generator = random.Random(0)
    known: dict[int, list[int]] = {}
    found: list[int] = []
    for _ in range(text.protocol.windows):
        for _ in range(_ATTEMPTS):
            index = generator.randint(0, len(text.documents) - 1)
            if index not in known:
                known[index] = encode(text.documents[index], tokenizer, special=True)
            if len(known[index]) > seq_len:
                break
        else:
            raise InputError(
                f"{text.name}: no document with more than {seq_len} tokens in {_ATTEMPTS:,} "
                "draws; lower --seq-len"
            )
        start = generator.randint(0, len(known[index]) - seq_len - 1)
        found += known[index][start : start + seq_len]
    return torch.tensor(found, dtype=torch.int64)


def _limited(protocol: Protocol, documents: Iterable[str]) -> Iterator[str]:
    return itertools.islice(documents, protocol.documents)


def _documents(source: str, path: Path, raw: bytes, protocol: Protocol) -> Iterator[str]:
    """The pieces of one file, as they are joined."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-1] if suffixes else ""
    if kind in DATA_FILES:
        records = data_file_records(source, path, instead=_INSTEAD)
        return map(protocol.piece, _fields(source, records, protocol.field))
    lines = _unzipped(source, path) if kind == ".gz" else None
    if kind == ".gz":
        kind = suffixes[-2] if len(suffixes) > 1 else ""
    if kind in _JSON:
        records = _json_lines(source, raw.split(b"\n") if lines is None else lines)
        return map(protocol.piece, _fields(source, records, protocol.field))
    if protocol.needs_records:
        raise InputError(
            f"{source}: {protocol.name} reads .json, .jsonl, .json.gz or .parquet with a field "
            f"{protocol.field!r}, as C4's shards are"
        )
    text = decode(source, raw if lines is None else b"".join(lines))
    return iter(protocol.pieces(text))


def _unzipped(source: str, path: Path) -> Iterator[bytes]:
    """The lines of a gzip file as they are needed."""
    try:
        with gzip.open(path, "rb") as file:
            yield from file
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{source}: not a whole gzip file ({error}); fetch it again") from error


def _json_lines(source: str, lines: Iterable[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(
                f"{source}: line {number}: not valid JSON ({reason}); give one object a line"
            ) from error


def _fields(source: str, records: Iterable[Any], field: str) -> Iterator[str]:
    for number, record in enumerate(records, 1):
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            found = ", ".join(map(str, record)) if isinstance(record, dict) else repr(record)[:40]
            raise InputError(
                f"{source}: record {number}: no text field {field!r} (found {found or 'none'})"
            )
        yield value


def _position(whole: list[int], part: list[int]) -> int:
    """Where `part` begins in `whole`: special tokens are around it, and none inside."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return start
    return 0

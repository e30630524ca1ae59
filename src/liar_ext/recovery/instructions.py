"""Instructions and their answers as windows, of which a loss counts the answers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration, encode
from liar_ext.calibration.overlap import sketch
from liar_ext.calibration.records import decode, json_records, read_bytes
from liar_ext.calibration.sources import Corpus, read
from liar_ext.errors import InputError
from liar_ext.recovery.language import held_apart
from liar_ext.recovery.text import Drawn

# fields of a record: what is asked, what is answered
PROMPTS = ("prompt", "response")
ALPACA = ("instruction", "output")


@dataclass(frozen=True, eq=False)
class Instructions:
    """Attributes:

    corpus: the file, its documents being prompts with their responses.
    pairs: (prompt, response), as they are put one behind the other.
    """

    corpus: Corpus
    pairs: tuple[tuple[str, str], ...]


def read_training(spec: str) -> Corpus | Instructions:
    """What `--train` names: instructions where a `.jsonl` has their fields, else a corpus.

    Raises:
        InputError: as `read`; or a record without the fields that the first one has.
    """
    path = Path(spec).expanduser()
    if not (path.is_file() and path.suffix.lower() == ".jsonl"):
        return read(spec)
    raw = read_bytes(spec, path)
    pairs: list[tuple[str, str]] = []
    fields: tuple[str, str] | None = None
    for where, record in json_records(spec, decode(spec, raw)):
        if fields is None:
            fields = _fields(record)
            if fields is None:
                return read(spec)
        pairs.append(_pair(where, record, fields))
    if not pairs:
        return read(spec)
    documents = tuple(prompt + response for prompt, response in pairs)
    digest = hashlib.sha256(raw).hexdigest()
    return Instructions(Corpus(spec, "jsonl", digest, documents), tuple(pairs))


def alpaca_prompt(instruction: str, given: str) -> str:
    """The prompt of an alpaca record: its parts under their headings."""
    parts = [f"### Instruction:\n{instruction}\n\n"]
    if given.strip():
        parts.append(f"### Input:\n{given}\n\n")
    return "".join([*parts, "### Response:\n"])


def windows_of_instructions(
    found: Instructions,
    tokenizer: Any,
    *,
    wanted: int,
    held_out: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
) -> Drawn:
    """Windows of one record each, drawn by seed, padded on the right.

    A window is the prompt with the tokenizer's special tokens in front, the response, and the end
    of a text where the tokenizer has one; what is beyond `seq_len` tokens is cut off. Prompt and
    response are cut into tokens apart, so that none is of both.

    Args:
        wanted, held_out: as of `windows_of`.
    Raises:
        InputError: no tokenizer; no record has its response in a window; token ids outside the
            vocabulary; or one record in all where some are to be held out.
    """
    name = found.corpus.name
    if tokenizer is None:
        raise InputError(f"{name}: text needs a tokenizer and the model has none; add one")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found.pairs), generator=generator).tolist()
    rows: list[tuple[list[int], int]] = []
    ids: list[int] = []
    left_out = 0
    for place in order:
        if len(rows) == wanted + held_out:
            break
        row, asked = _tokens(found.pairs[place], tokenizer)
        if asked >= seq_len:
            left_out += 1
            continue
        rows.append((row[:seq_len], asked))
        ids.append(place)
    if not rows:
        raise InputError(
            f"{name}: every prompt alone has {seq_len} tokens or more, so that no window has any "
            "of its response; give longer windows (--seq-len)"
        )
    if held_out and len(rows) < 2:
        raise InputError(f"{name}: one record, and some are held out; give more, or --held-out 0")
    every = _padded(rows)
    highest = int(every.input_ids.max())
    if highest >= vocab_size:
        raise InputError(
            f"{name}: token id {highest} is outside the model's vocabulary of {vocab_size}; "
            "use the model's own tokenizer"
        )
    apart = held_apart(len(rows), wanted, held_out)
    calibration = Calibration(
        batches=(every,),
        source=name,
        sha256=found.corpus.sha256,
        seed=seed,
        seq_len=seq_len,
        requested=wanted + held_out,
        sample_ids=tuple(ids),
        sketch=tuple(sketch(found.corpus)),
    )
    kept = every.rows(apart) if held_out else None
    return Drawn(every.rows(~apart), kept, calibration, left_out)


def _fields(record: Any) -> tuple[str, str] | None:
    known = record if isinstance(record, dict) else {}
    return next((f for f in (PROMPTS, ALPACA) if all(name in known for name in f)), None)


def _pair(where: str, record: Any, fields: tuple[str, str]) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object, got {record!r:.40}")
    values = {}
    for name in (*fields, *(("input",) if fields is ALPACA else ())):
        value = record.get(name, "" if name == "input" else None)
        if not isinstance(value, str):
            state = "is not a string" if name in record else "is missing"
            raise InputError(
                f"{where}: field {name!r} {state}; every record needs {' and '.join(fields)} as "
                "strings"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: field {name!r} has an unpaired surrogate; remove it"
            ) from None
        values[name] = value
    asked, answered = (values[name] for name in fields)
    if not answered.strip():
        raise InputError(f"{where}: field {fields[1]!r} is empty; there is nothing to learn from")
    if fields is ALPACA:
        asked = alpaca_prompt(asked, values["input"])
    return asked, answered


def _tokens(pair: tuple[str, str], tokenizer: Any) -> tuple[list[int], int]:
    """Of a record, and how many of them are of its prompt."""
    prompt, response = pair
    end = tokenizer.eos_token_id
    asked = encode(prompt, tokenizer, special=True)
    if asked and asked[-1] == end and len(asked) > 1:
        # some put one behind every text
        asked = asked[:-1]
    answered = encode(response, tokenizer, special=False)
    return asked + answered + ([] if end is None else [end]), len(asked)


def _padded(rows: Sequence[tuple[list[int], int]]) -> Batch:
    batch = Batch.of_rows([row for row, _ in rows])
    answers = batch.attention_mask.clone()
    for at, (_, asked) in enumerate(rows):
        answers[at, :asked] = False
    return replace(batch, answers=answers)

"""Questions of SQuAD from its files and data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_ext.calibration.records import (
    DATA_FILES,
    data_file_records,
    dataset_parts,
    dataset_records,
    decode,
    json_records,
    read_bytes,
)
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError

_INSTEAD = "SQuAD's .json file"


@dataclass(frozen=True)
class Question:
    """Attributes: `id`, `text`, `context`; `answers`, references; `where`, for messages."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class SquadSet:
    """Attributes: `name` as the user gave it; `version`, 1 or 2; `sha256` of the file's bytes, of a
    data set that of its records; `questions` in order."""

    name: str
    version: int
    sha256: str
    questions: tuple[Question, ...]

    def corpus(self) -> Corpus:
        """The texts, for `calibration.overlap`."""
        contexts = dict.fromkeys(question.context for question in self.questions)
        texts = (*contexts, *(question.text for question in self.questions))
        return Corpus(self.name, "jsonl", self.sha256, tuple(t for t in texts if t.strip()))


def read_squad(spec: str) -> SquadSet:
    """Read questions.

    Args:
        spec: `FILE.json` as SQuAD distributes it; `.jsonl` or `.parquet` with the hub's fields (id,
            question, context, answers {text, answer_start}); or `NAME[:CONFIG][:SPLIT]`, a data
            set, split `validation` by default. It is of version 2 where it says so or has a
            question without an answer.
    Raises:
        InputError: the source is missing, cut off, empty or has other fields; two questions have
            one id; version 1.1 has a question without an answer.
    """
    path = Path(spec).expanduser()
    stated = None
    digest = hashlib.sha256()
    if path.is_file():
        raw = read_bytes(spec, path)
        digest.update(raw)
        suffix = path.suffix.lower()
        if suffix == ".json":
            stated, found = _official(spec, decode(spec, raw))
        elif suffix == ".jsonl":
            found = _records(json_records(spec, decode(spec, raw)))
        elif suffix in DATA_FILES:
            found = _records(_numbered(spec, data_file_records(spec, path, instead=_INSTEAD)))
        else:
            readable = ", ".join((".json", ".jsonl", *DATA_FILES))
            raise InputError(
                f"{spec}: cannot read a {suffix or 'suffixless'} file; give {readable}"
            )
    else:
        name, config, split = dataset_parts(spec, ("CONFIG", "SPLIT"))
        records = dataset_records(spec, name, config, split or "validation", instead=_INSTEAD)
        found = _records(_numbered(spec, records))
    questions = tuple(found)
    if not path.is_file():
        for question in questions:
            digest.update(repr(question).encode())
    if not questions:
        raise InputError(f"{spec}: no questions; give a file of SQuAD")
    _check(questions, stated)
    unanswered = any(not question.answers for question in questions)
    version = 2 if unanswered or (stated or "").startswith("v2") else 1
    return SquadSet(spec, version, digest.hexdigest(), questions)


def _check(questions: tuple[Question, ...], stated: str | None) -> None:
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise InputError(
                f"{question.where}: id {question.id!r} is that of {seen[question.id]} too; "
                "questions need ids of their own"
            )
        seen[question.id] = question.where
        if not question.answers and stated is not None and not stated.startswith("v2"):
            raise InputError(
                f"{question.where}: has no answer, and the file says version {stated}; test sets "
                "have none: use the dev set"
            )


def _official(spec: str, text: str) -> tuple[str | None, Iterator[Question]]:
    """The version that the file states, and its questions."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        line = getattr(error, "lineno", "?")
        raise InputError(
            f"{spec}: line {line}: not valid JSON ({reason}); the file is cut off, or is not "
            "SQuAD's (JSON lines have the suffix .jsonl)"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("data"), list):
        found = ", ".join(map(str, data))[:80] if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{spec}: no list 'data' of articles (found {found}); give SQuAD's .json")
    version = data.get("version")
    return None if version is None else str(version), _articles(spec, data["data"])


def _articles(spec: str, articles: list[Any]) -> Iterator[Question]:
    for number, article in enumerate(articles, 1):
        where = f"{spec}: article {number}"
        for place, paragraph in enumerate(_list(where, article, "paragraphs"), 1):
            inside = f"{where}, paragraph {place}"
            context = _text(inside, paragraph, "context")
            for asked in _list(inside, paragraph, "qas"):
                own = f"{inside}, question {asked.get('id') if isinstance(asked, dict) else '?'}"
                answers = _list(own, asked, "answers")
                # plausible answers of unanswerable questions are another field
                references = () if asked.get("is_impossible") else answers
                texts = tuple(_text(own, answer, "text") for answer in references)
                yield Question(
                    str(asked.get("id")), _text(own, asked, "question"), context, texts, own
                )


def _records(records: Iterator[tuple[str, Any]]) -> Iterator[Question]:
    for where, record in records:
        answers = record.get("answers") if isinstance(record, Mapping) else None
        texts = answers.get("text") if isinstance(answers, Mapping) else None
        if texts is None or not all(isinstance(text, str) for text in texts):
            found = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
            raise InputError(
                f"{where}: no 'answers' with a list 'text' (found {found[:80]}); give the hub's "
                "fields: id, question, context, answers"
            )
        yield Question(
            _text(where, record, "id"),
            _text(where, record, "question"),
            _text(where, record, "context"),
            tuple(texts),
            where,
        )


def _numbered(spec: str, records: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, 1):
        yield f"{spec}: record {number}", record


def _list(where: str, value: Any, field: str) -> list[Any]:
    found = value.get(field) if isinstance(value, Mapping) else None
    if not isinstance(found, list):
        raise InputError(f"{where}: no list {field!r}; give SQuAD's .json")
    return found


def _text(where: str, value: Any, field: str) -> str:
    found = value.get(field) if isinstance(value, Mapping) else None
    if not isinstance(found, str) or (not found.strip() and field != "text"):
        raise InputError(f"{where}: field {field!r} is {found!r:.40}; give a text")
    return found

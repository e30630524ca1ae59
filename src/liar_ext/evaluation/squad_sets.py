"""Questions of SQuAD from its files and data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liar_ext.calibration.records import json_records
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError
from liar_ext.evaluation.records import Records, open_records


@dataclass(frozen=True)
class Question:
    """Attributes: `id`, `text`, `context`; `answers`, references; `where`, for messages; `version`
    that its file states."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    where: str
    version: str | None = None


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
    readers = {".json": _official, ".jsonl": json_records}
    records, digest = open_records(spec, readers, "validation", "SQuAD's .json file")
    questions = tuple(_question(where, record) for where, record in records)
    if not questions:
        raise InputError(f"{spec}: no questions; give a file of SQuAD")
    # only the official file says it
    stated = {question.version for question in questions} - {None}
    _check(questions)
    unanswered = any(not question.answers for question in questions)
    version = 2 if unanswered or any(str(one).startswith("v2") for one in stated) else 1
    return SquadSet(spec, version, digest(), questions)


def _check(questions: tuple[Question, ...]) -> None:
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise InputError(
                f"{question.where}: id {question.id!r} is that of {seen[question.id]} too; "
                "questions need ids of their own"
            )
        seen[question.id] = question.where
        stated = question.version
        if not question.answers and stated is not None and not stated.startswith("v2"):
            raise InputError(
                f"{question.where}: has no answer, and the file says version {stated}; test sets "
                "have none: use the dev set"
            )


def _official(spec: str, text: str) -> Records:
    """The questions of SQuAD's own file, in the hub's fields, with the version that it states."""
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
    version = None if data.get("version") is None else str(data["version"])
    for number, article in enumerate(data["data"], 1):
        where = f"{spec}: article {number}"
        for place, paragraph in enumerate(_list(where, article, "paragraphs"), 1):
            inside = f"{where}, paragraph {place}"
            context = _text(inside, paragraph, "context")
            for asked in _list(inside, paragraph, "qas"):
                name = asked.get("id") if isinstance(asked, Mapping) else "?"
                own = f"{inside}, question {name}"
                answers = _list(own, asked, "answers")
                # plausible answers of unanswerable questions are another field
                references = [] if asked.get("is_impossible") else answers
                texts = [_text(own, answer, "text") for answer in references]
                record = {"id": str(name), "context": context, "answers": {"text": texts}}
                yield own, {**record, "question": asked.get("question"), "version": version}


def _question(where: str, record: Any) -> Question:
    answers = record.get("answers") if isinstance(record, Mapping) else None
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        found = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
        raise InputError(
            f"{where}: no 'answers' with a list 'text' (found {found[:80]}); give the hub's "
            "fields: id, question, context, answers"
        )
    return Question(
        id=_text(where, record, "id"),
        text=_text(where, record, "question"),
        context=_text(where, record, "context"),
        answers=tuple(texts),
        where=where,
        version=record.get("version"),
    )


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

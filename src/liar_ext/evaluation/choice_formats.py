r"""Formats of multiple-choice records: how each becomes a context and its continuations.

A record is recognised by its fields, those of the data sets on the Hugging Face hub; the first
format that it has all fields of is its own. Choices of an item differ in the continuation alone.

piqa: goal, sol1, sol2, label (from 0)
    Question: {goal}\nAnswer: -> {sol1}, {sol2}
hellaswag: ctx, endings, label (from 0)
    {activity_label}: {ctx} -> {ending}, cleaned of what WikiHow left in brackets; with ctx_b, which
    begins the sentence that is to be ended, the context is {ctx_a} {ctx_b}, that one capitalised
winogrande: sentence, option1, option2, answer (1 or 2)
    what stands before the "_" of the sentence -> {option} and what stands behind it
race: article, question, options, answer (a letter)
    Article: {article}\n\nQuestion: {question}\nAnswer: -> {option}
commonsense_qa: question, question_concept, choices, answerKey
    Question: {question}\nA. {choice}\nB. ...\nAnswer: -> A, B, ...
arc: question, choices, answerKey
    Question: {question}\nAnswer: -> {choice}
openbookqa: question_stem, choices, answerKey
    {question_stem} -> {choice}
boolq: question, passage, answer (true or false; or label, 0 or 1)
    {passage}\nQuestion: {question}?\nAnswer: -> no, yes
mmlu: question, subject, choices, answer (from 0)
    The following are multiple choice questions (with answers) about {subject}.\n\n
    {question}\nA. {choice}\nB. ...\nAnswer: -> A, B, ...
plain: context or question or both, choices, answer (from 0)
    {context}\nQuestion: {question}\nAnswer: -> {choice}

A space is between the two, except where a WinoGrande sentence has none and where the context is
empty. Texts lose white space around them. `choices` beside an `answerKey` are
`{"text": [...], "label": [...]}`, else a list.

The words are those of EleutherAI's lm-evaluation-harness without examples in front, except for
race (which asks several questions of an article in one prompt there) and winogrande (which scores
there what stands behind the option alone, under two contexts).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liar_ext.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: what all options have in front of them; may be empty.
        choices: the continuations without what joins them to the context, two or more.
        answer: index of the right one.
        where: file and line, for messages.
        joint: between context and choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""
    joint: str = " "

    def continuations(self) -> list[str]:
        """The choices as they follow the context."""
        return [(self.joint if self.context else "") + choice for choice in self.choices]


class Record:
    """One record: its fields, checked as they are read.

    Raises:
        InputError: it is no object; from the methods, a field is not what it should be.
    """

    def __init__(self, where: str, data: Any) -> None:
        if not isinstance(data, dict):
            raise InputError(f"{where}: expected an object, got {data!r:.40}")
        self.where, self._data = where, data

    def __contains__(self, field: str) -> bool:
        return field in self._data

    def fields(self) -> str:
        return ", ".join(map(str, self._data)) or "none"

    def text(self, field: str) -> str:
        """A text that is not blank, without white space around it."""
        return self._text(f"field {field!r}", self._data[field])

    def optional(self, field: str) -> bool:
        """Whether there is a text that is not blank."""
        value = self._data.get(field)
        return isinstance(value, str) and bool(value.strip())

    def options(self, field: str) -> tuple[str, ...]:
        """A list of two texts or more."""
        return self._options(field, self._data[field])

    def labelled(self) -> tuple[tuple[str, ...], int]:
        """`choices` as texts with labels, and the position of `answerKey` among these."""
        choices = self._data["choices"]
        if not isinstance(choices, dict) or not {"text", "label"} <= set(choices):
            raise self.refuse(
                f"field 'choices' is {choices!r:.40}; give an object with lists 'text' and 'label'"
            )
        texts = self._options("choices.text", choices["text"])
        labels, key = choices["label"], self._data["answerKey"]
        if not isinstance(labels, list) or len(labels) != len(texts):
            raise self.refuse(f"choices.label {labels!r:.60} is no list of {len(texts)} labels")
        key = key.strip() if isinstance(key, str) else key
        if key not in labels:
            raise self.refuse(
                self._unanswered("answerKey", f"one of {', '.join(map(str, labels))}")
            )
        return texts, labels.index(key)

    def number(self, field: str, first: int, count: int) -> int:
        """Position of an answer that counts from `first`: an integer, or a text of one."""
        value = self._data[field]
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value - first < count:
            raise self.refuse(self._unanswered(field, f"from {first} to {first + count - 1}"))
        return value - first

    def letter(self, field: str, count: int) -> int:
        """Position of an answer that is a letter."""
        value = self._data[field]
        position = LETTERS.find(value.strip()) if isinstance(value, str) and value.strip() else -1
        if not 0 <= position < count or len(value.strip()) != 1:
            raise self.refuse(self._unanswered(field, f"from A to {LETTERS[count - 1]}"))
        return position

    def flag(self, field: str) -> int:
        """0 or 1: a boolean, or one of the two numbers."""
        value = self._data[field]
        return int(value) if isinstance(value, bool) else self.number(field, 0, 2)

    def refuse(self, reason: str) -> InputError:
        return InputError(f"{self.where}: {reason}")

    def _text(self, what: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.refuse(f"{what} is {value!r:.40}; give a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refuse(f"{what} has an unpaired surrogate; remove it") from None
        return value.strip()

    def _options(self, field: str, values: Any) -> tuple[str, ...]:
        if not isinstance(values, list):
            raise self.refuse(f"field {field!r} is {values!r:.40}; give a list of texts")
        if not 2 <= len(values) <= len(LETTERS):
            raise self.refuse(
                f"field {field!r} has {len(values)} choices; give 2 to {len(LETTERS)}"
            )
        return tuple(self._text(f"{field}[{i}]", value) for i, value in enumerate(values))

    def _unanswered(self, field: str, wanted: str) -> str:
        return (
            f"{field} {self._data[field]!r:.40} is not {wanted}; test splits often have no "
            "answers: use the validation split"
        )


@dataclass(frozen=True)
class Format:
    """Attributes: `name`; `fields` that tell it; `item`: what makes an Item of a Record."""

    name: str
    fields: tuple[str, ...]
    item: Callable[[Record], Item]


def _piqa(record: Record) -> Item:
    choices = (record.text("sol1"), record.text("sol2"))
    return Item(_asked(record.text("goal")), choices, record.number("label", 0, 2), record.where)


def _hellaswag(record: Record) -> Item:
    context = record.text("ctx")
    if "ctx_a" in record and record.optional("ctx_b"):
        # the second half begins a sentence, which the ending goes on
        context = f"{record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    if "activity_label" in record:
        context = f"{record.text('activity_label')}: {context}"
    endings = tuple(map(_cleaned, record.options("endings")))
    if not all(endings):
        raise record.refuse("an ending has nothing but marks in brackets")
    answer = record.number("label", 0, len(endings))
    return Item(_cleaned(context), endings, answer, record.where)


def _winogrande(record: Record) -> Item:
    before, blank, behind = record.text("sentence").partition("_")
    if not blank:
        raise record.refuse("field 'sentence' has no '_' where the options belong")
    choices = (record.text("option1") + behind, record.text("option2") + behind)
    joint = " " if before.endswith(" ") else ""
    return Item(before.rstrip(), choices, record.number("answer", 1, 2), record.where, joint)


def _race(record: Record) -> Item:
    options = record.options("options")
    context = f"Article: {record.text('article')}\n\n{_asked(record.text('question'))}"
    return Item(context, options, record.letter("answer", len(options)), record.where)


def _commonsense_qa(record: Record) -> Item:
    choices, answer = record.labelled()
    question = f"Question: {record.text('question')}"
    return Item(_listed(question, choices), _letters(choices), answer, record.where)


def _arc(record: Record) -> Item:
    return Item(_asked(record.text("question")), *record.labelled(), record.where)


def _openbookqa(record: Record) -> Item:
    return Item(record.text("question_stem"), *record.labelled(), record.where)


def _boolq(record: Record) -> Item:
    question = record.text("question").removesuffix("?").rstrip()
    context = f"{record.text('passage')}\n{_asked(question + '?')}"
    answer = record.flag("answer" if "answer" in record else "label")
    return Item(context, ("no", "yes"), answer, record.where)


def _mmlu(record: Record) -> Item:
    choices = record.options("choices")
    subject = record.text("subject").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    context = about + _listed(record.text("question"), choices)
    return Item(context, _letters(choices), record.number("answer", 0, len(choices)), record.where)


def _plain(record: Record) -> Item:
    choices = record.options("choices")
    parts = [record.text("context")] if "context" in record else []
    parts += [_asked(record.text("question"))] if "question" in record else []
    return Item("\n".join(parts), choices, record.number("answer", 0, len(choices)), record.where)


FORMATS = (
    Format("piqa", ("goal", "sol1", "sol2", "label"), _piqa),
    Format("hellaswag", ("ctx", "endings", "label"), _hellaswag),
    Format("winogrande", ("sentence", "option1", "option2", "answer"), _winogrande),
    Format("race", ("article", "question", "options", "answer"), _race),
    Format(
        "commonsense_qa", ("question", "question_concept", "choices", "answerKey"), _commonsense_qa
    ),
    Format("arc", ("question", "choices", "answerKey"), _arc),
    Format("openbookqa", ("question_stem", "choices", "answerKey"), _openbookqa),
    Format("boolq", ("question", "passage", "answer"), _boolq),
    Format("boolq", ("question", "passage", "label"), _boolq),
    Format("mmlu", ("question", "subject", "choices", "answer"), _mmlu),
    Format("plain", ("context", "choices", "answer"), _plain),
    Format("plain", ("question", "choices", "answer"), _plain),
)


def format_of(record: Record) -> Format:
    """The first format whose fields a record has; raises InputError that names all of them."""
    for form in FORMATS:
        if all(field in record for field in form.fields):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.fields)})" for form in FORMATS)
    raise record.refuse(f"fields {record.fields()} are of no known format; known are {known}")


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _listed(question: str, choices: tuple[str, ...]) -> str:
    lines = (f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return "\n".join([question, *lines, "Answer:"])


def _letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(LETTERS[: len(choices)])


def _cleaned(text: str) -> str:
    """HellaSwag's text without the marks of its WikiHow half."""
    text = text.replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()

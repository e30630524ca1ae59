"""Multiple-choice sets from files and data sets; `choice_formats` says what records they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liar_ext.calibration.records import json_records
from liar_ext.calibration.sources import Corpus
from liar_ext.errors import InputError
from liar_ext.evaluation.choice_formats import Format, Item, Record, format_of
from liar_ext.evaluation.records import open_records


@dataclass(frozen=True)
class ChoiceSet:
    """The items of one source.

    Attributes:
        name: as the user gave it; format: the name of the records' form.
        sha256: hex digest of the file's bytes; of a data set, of the records that were read.
        items: in the order of the source.
        documents: all texts of the records, to recognise them in a calibration text.
    """

    name: str
    format: str
    sha256: str
    items: tuple[Item, ...]
    documents: tuple[str, ...]

    @property
    def chance(self) -> float:
        """The expected share of right answers of a blind choice."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def corpus(self) -> Corpus:
        """The texts, for `calibration.overlap`."""
        return Corpus(self.name, "jsonl", self.sha256, self.documents)


def read_choices(spec: str) -> ChoiceSet:
    """Read a multiple-choice set.

    Args:
        spec: `FILE.jsonl` (an object a line), `FILE.parquet`, `FILE.arrow`, or
            `NAME[:CONFIG][:SPLIT]`, a data set for the package `datasets`: a hub name or a local
            folder, split `validation` by default (test splits often have no answers). All but the
            first need that package.
    Raises:
        InputError: the source is missing, malformed or empty, records are of no or of several
            formats, or one of them has no answer, an answer out of range, or fewer than two
            choices. The message names the line.
    """
    found: list[tuple[Format, Item]] = []
    documents: list[str] = []
    records, digest = open_records(spec, {".jsonl": json_records}, "validation", "a .jsonl file")
    for where, data in records:
        record = Record(where, data)
        form = format_of(record)
        if found and form.name != found[0][0].name:
            raise InputError(
                f"{where}: a {form.name} record, and {found[0][1].where} is {found[0][0].name}; "
                "give files of one format each"
            )
        found.append((form, form.item(record)))
        documents += texts_of(data)
    if not found:
        raise InputError(f"{spec}: no records; give one multiple-choice question a line")
    items = tuple(item for _, item in found)
    return ChoiceSet(spec, found[0][0].name, digest(), items, tuple(documents))


def texts_of(value: Any) -> list[str]:
    """Every string in JSON data that is not blank, without unpaired surrogates."""
    if isinstance(value, str):
        return [value.encode(errors="replace").decode()] if value.strip() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in texts_of(part)] if isinstance(value, list) else []

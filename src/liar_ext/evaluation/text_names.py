"""The protocols of perplexity by name; importing this imports no library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from liar_ext.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """How the pieces of a data set become one stream.

    Attributes:
        name: as it is given; join: between documents.
        hub: the data set where no source is given; split, field: of it, and of others.
        piece: what a record's text, or a line, becomes.
        pieces: what a file of text becomes.
        documents: of the source the first so many; windows: of the tokens. None is all.
        sampled: windows are drawn from documents.
        needs_records: lines of text are not a form of it.
    """

    name: str
    join: str
    hub: str | None = None
    split: str = "test"
    field: str = "text"
    piece: Callable[[str], str] = str
    pieces: Callable[[str], Iterable[str]] = lambda text: [text]
    documents: int | None = None
    windows: int | None = None
    sampled: bool = False
    needs_records: bool = False


def _wikitext_line(line: str) -> str:
    return line if line.strip() else ""


def _wikitext_lines(text: str) -> list[str]:
    return [_wikitext_line(line) for line in _lines(text)]


def _sentences(text: str) -> list[str]:
    return [line.strip() for line in _lines(text) if line.strip()]


def _lines(text: str) -> list[str]:
    """With their ends; split at "\n" alone, for str.splitlines also cuts at U+2028."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


_C4 = "allenai/c4:en"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("plain", "\n\n"),
        Protocol(
            "wikitext2",
            "\n\n",
            hub="Salesforce/wikitext:wikitext-2-raw-v1",
            piece=_wikitext_line,
            pieces=_wikitext_lines,
        ),
        # the hub has it as a script, which `datasets` runs no more
        Protocol("ptb", " ", field="sentence", piece=str.strip, pieces=_sentences),
        Protocol(
            "ptb-lines",
            "\n\n",
            split="validation",
            field="sentence",
            piece=str.strip,
            pieces=_sentences,
        ),
        Protocol(
            "c4",
            " ",
            hub=_C4,
            split="validation",
            documents=1100,
            windows=256,
            needs_records=True,
        ),
        Protocol("c4-sampled", "", windows=256, sampled=True, needs_records=True),
    )
}


def protocol_of(spec: str) -> tuple[Protocol, str]:
    """The protocol and the source that a spec names, see `texts.read_text`.

    Raises:
        InputError: it is neither a file nor begins with a protocol.
    """
    if Path(spec).expanduser().is_file():
        return PROTOCOLS["plain"], spec
    name, equals, source = spec.partition("=")
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise InputError(
            f"{spec}: no such file; give FILE, or PROTOCOL=FILE with {', '.join(PROTOCOLS)}"
        )
    if not source and (equals or protocol.hub is None):
        raise InputError(f"{spec}: names no source; give {name}=FILE")
    found = source or protocol.hub
    assert found is not None
    return protocol, found

"""Parts of the HTML page, as text. Everything from outside is escaped here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from liar_ext.report.text import NONE

# lists that identify samples are for machines; the page says how long they are
LONGEST_VALUE = 200


class Html(str):
    """Markup that was made here, and is not escaped again."""

    __slots__ = ()


def text(value: str) -> Html:
    """What is shown of a string: itself where it is markup of ours, else escaped."""
    return value if isinstance(value, Html) else Html(escape(value))


def join(parts: Iterable[str], between: str = "\n") -> Html:
    """The parts that say something."""
    return Html(between.join(text(part) for part in parts if part))


def element(tag: str, inside: str, **attributes: str | None) -> Html:
    """`<tag …>inside</tag>`; attributes that are None are left out, `_` in their names is `-`."""
    stated = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{stated}>{text(inside)}</{tag}>")


def paragraph(inside: str, class_: str | None = None) -> Html:
    return element("p", inside, class_=class_)


def code(inside: str) -> Html:
    return element("code", inside)


def listing(items: Iterable[str], class_: str | None = None) -> Html:
    return element("ul", join((element("li", item) for item in items), ""), class_=class_)


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading that the contents name.

    Attributes:
        name: unique on the page, for links; title: the heading.
        body: what stands under it; short: what the contents call it, None for the title.
    """

    name: str
    title: str
    body: Html
    short: str | None = None

    def html(self) -> Html:
        heading = element("h2", self.title, id=f"{self.name}-title")
        inside = join([heading, self.body])
        return element("section", inside, id=self.name, aria_labelledby=f"{self.name}-title")


def contents(sections: Sequence[Section]) -> Html:
    """Links to the sections."""
    links = [element("a", s.short or s.title, href=f"#{s.name}") for s in sections]
    return element("nav", listing(links), aria_label="Contents")


def cards(items: Sequence[tuple[str, str, str]]) -> Html:
    """Figures to be seen first: a label, a value, and what there is to say of it."""
    each = (
        element(
            "div",
            join(
                [
                    element("dt", label),
                    element("dd", value),
                    # a figure and its unit stay on one line
                    element("dd", note.replace(" %", "\u00a0%")) if note else Html(""),
                ],
                "",
            ),
        )
        for label, value, note in items
    )
    return element("dl", join(each, ""), class_="totals")


def figure(svg: str | None, caption: str, data: Html | None = None) -> Html:
    """A plot with what it shows, and its numbers as a table to open; empty without a plot."""
    if svg is None:
        return Html("")
    numbers = details("The numbers", data) if data is not None else Html("")
    return element("figure", join([Html(svg), element("figcaption", caption), numbers]))


def plots(figures: Iterable[Html]) -> Html:
    """Figures side by side where there is room."""
    drawn = join(figures)
    return element("div", drawn, class_="plots") if drawn else Html("")


def details(summary: str, inside: Html, *, opened: bool = False) -> Html:
    """What opens on a click or with the keyboard, and is open on paper."""
    start = "<details open>" if opened else "<details>"
    return Html(f"{start}{element('summary', summary)}\n{inside}</details>")


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: Sequence[str] = (),
) -> Html:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        caption: also what a screen reader calls it.
        head: a name for each column; the cells of the first one head their rows.
        words: columns that are no numbers, besides the first; numbers are aligned to the right.
    """
    classes = [None if name in words or i == 0 else "number" for i, name in enumerate(head)]
    top = join(
        (
            element("th", name, scope="col", class_=class_)
            for name, class_ in zip(head, classes, strict=True)
        ),
        "",
    )
    lines = []
    for first, *rest in rows:
        cells = [
            element("td", cell, class_=class_)
            for cell, class_ in zip(rest, classes[1:], strict=True)
        ]
        lines.append(element("tr", join([element("th", first, scope="row"), *cells], "")))
    inside = join(
        [
            element("caption", caption),
            element("thead", element("tr", top)),
            element("tbody", join(lines)),
        ]
    )
    return element(
        "div",
        element("table", inside),
        class_="wide",
        role="region",
        tabindex="0",
        aria_label=caption,
    )


def records(caption: str, data: Mapping[str, Any]) -> Html:
    """A mapping as a table of two columns."""
    rows = [[key.replace("_", " "), shown(value)] for key, value in data.items()]
    return table(caption, ["field", "value"], rows, words=("value",))


def shown(value: Any) -> str:
    """A value of JSON data in a cell: short, and without the folders of this machine."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        told = ", ".join(f"{key} {shown(one)}" for key, one in value.items()) or NONE
    elif isinstance(value, list | tuple):
        told = ", ".join(shown(one) for one in value) or NONE
    else:
        return without_folders(str(value))
    if len(told) > LONGEST_VALUE:
        return f"{len(value):,} entries, see liar_report.json"
    return told


def without_folders(value: str) -> str:
    """An absolute path as its last part: pages are sent to others."""
    return Path(value).name or value if re.match(r"(/|~|[A-Za-z]:\\)", value) else value

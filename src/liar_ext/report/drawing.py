"""How plots become inline SVG: no script, no network, and colours that the page decides.

matplotlib writes fixed colours; here it draws with placeholders that become `currentColor` and CSS
variables, so that the same plot is readable on a light and on a dark page. Text stays text, and a
bar or a point says its value when it is pointed at.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from liar_ext.report.text import number

INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#{i:02x}{i:02x}{i:02x}" for i in range(3, 11))
# what the placeholders become; the variables are in template.html
COLOURS = {INK: "currentColor", FAINT: "var(--faint)"} | {
    name: f"var(--series-{i})" for i, name in enumerate(SERIES)
}
# colour alone does not reach every reader
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
# the stubs of matplotlib spell out every key
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    # nothing may keep a colour of matplotlib's own, not even the caps of error bars
    "axes.prop_cycle": cycler(color=[INK]),
}
# inches; narrow, so that the words of a plot can be read on a telephone
WIDTH = 5.4
_TITLE = "liar-says-"


class Drawing:
    """A figure with one panel below another.

    Use it as a context; `svg` ends it. Attributes: `panels`, `name` (unique on the page).
    """

    def __init__(self, name: str, panels: int, height: float) -> None:
        self.name = name
        self._context = matplotlib.rc_context({**STYLE, "svg.hashsalt": name})
        self._size = (WIDTH, max(panels, 1) * height)
        self._count = max(panels, 1)
        self._said: list[str] = []

    def __enter__(self) -> Drawing:
        self._context.__enter__()
        self._figure = Figure(figsize=self._size, layout="constrained")
        self.panels: list[Axes] = list(self._figure.subplots(self._count, 1, squeeze=False)[:, 0])
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def say(self, artist: Artist, text: str) -> None:
        """What the page shows where a reader points at a bar or at a point."""
        artist.set_gid(f"{_TITLE}{len(self._said)}")
        self._said.append(text)

    def svg(self, title: str) -> str:
        """The figure as an `<svg>` element: no prolog, unique ids, the page's colours."""
        buffer = io.StringIO()
        self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(
            r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.S
        )
        text = re.sub(rf'<g id="{_TITLE}(\d+)">', self._titled, text)
        text = re.sub(r'\b(id="|href="#)|(url\(#)', lambda m: f"{m[0]}{self.name}-", text)
        for placeholder, colour in COLOURS.items():
            text = text.replace(placeholder, colour)
        # the page's own font: releases of matplotlib write it in two ways
        text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", text)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text).replace("xlink:href", "href")
        # groups that nothing refers to are most of the ids
        used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
        kept = {one for pair in used for one in pair}
        text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in kept else "", text)
        text = re.sub(r"\n\s*", "\n", text)
        box = re.search(r'viewBox="[^"]*"', text)
        assert box is not None, "matplotlib states a viewBox"
        head = (
            f'<svg {box[0]} role="img" aria-labelledby="{self.name}-title">'
            f'<title id="{self.name}-title">{escape(title)}</title>'
        )
        return head + text[text.index(">") + 1 :].strip()

    def _titled(self, found: re.Match[str]) -> str:
        return f"<g><title>{escape(self._said[int(found[1])])}</title>"


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values are of different magnitude, else from zero."""
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        # plain numbers: powers of ten are superscripts, which are too small to read
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 4))
    else:
        axes.set_ylim(bottom=0)


def layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0)


def literal(text: str, longest: int = 34) -> str:
    """Text that matplotlib shall not read as a formula, and that leaves room for the plot."""
    half = longest // 2 - 1
    short = text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
    return short.replace("$", r"\$")

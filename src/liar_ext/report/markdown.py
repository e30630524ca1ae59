"""Text from outside in Markdown."""

from __future__ import annotations


def plain(text: str) -> str:
    """Text from outside, as one line of Markdown that formats and embeds nothing."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|#":
        line = line.replace(mark, f"\\{mark}")
    return line


def code(text: str) -> str:
    """A code span, also for text with backticks; a table's bar is replaced by its look-alike."""
    line = " ".join(text.split()).replace("|", "¦")
    if not line:
        return ""
    fence = "`"
    while fence in line:
        fence += "`"
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"

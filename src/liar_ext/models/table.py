"""The table of families in README.md, from the registry.

`python -m liar_ext.models.table README.md` writes it between its markers; without a page it is
printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import AutoConfig

from liar_ext.errors import InputError
from liar_ext.models import ADAPTERS
from liar_ext.models.adapter import Adapter

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEAD = ("family (`model_type`)", "prunes", "equal widths load in", "remarks")
# variants that say more than a config's defaults do
EXAMPLES = {"falcon": {"new_decoder_architecture": True}}
NAMES = {"ffn": "FFN", "heads": "heads"}


def rows() -> list[tuple[str, ...]]:
    """Cells under `HEAD`; families that differ in their name alone share a row."""
    found: dict[tuple[str, ...], list[str]] = {}
    for model_type, adapter in ADAPTERS.items():
        config = AutoConfig.for_model(model_type, **EXAMPLES.get(model_type, {}))
        found.setdefault(_cells(adapter.of(config), adapter.residual(config)), []).append(
            f"`{model_type}`"
        )
    return [(", ".join(names), *cells) for cells, names in found.items()]


def _cells(adapter: Adapter, residual: bool) -> tuple[str, ...]:
    stock = [NAMES[spec.kind] for spec in adapter.sites if spec.config_fields is not None]
    own = [NAMES[spec.kind] for spec in adapter.sites if spec.config_fields is None]
    loaders = [f"{', '.join(stock)}: transformers"] if stock else []
    loaders += [f"{', '.join(own)}: `liar_ext.load`"] if own else []
    remarks = [f"{kind} stay: {reason}" for kind, reason in adapter.refused.items()]
    remarks += [adapter.note] if adapter.note else []
    if adapter.decoder and not residual:
        remarks.append("no `stream` target")
    kinds = ", ".join(NAMES[spec.kind] for spec in adapter.sites)
    return kinds, "; ".join(loaders), "; ".join(remarks)


def markdown() -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(text: str) -> tuple[str, str, str]:
    """A page in front of the table, the table, and behind it.

    Raises:
        InputError: it has not one of each marker, in order.
    """
    front, begin, rest = text.partition(BEGIN)
    table, end, behind = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in behind:
        raise InputError(f"no one place between {BEGIN} and {END}")
    return f"{front}{BEGIN}\n", table.strip(), f"\n{END}{behind}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m liar_ext.models.table")
    parser.add_argument("page", nargs="?", type=Path, help="write it into this page")
    page = parser.parse_args(arguments).page
    if page is None:
        print(markdown())
        return 0
    try:
        front, _, behind = between(page.read_text(encoding="utf-8"))
    except (OSError, InputError) as error:
        print(f"error: {page}: {error}", file=sys.stderr)
        return 2
    page.write_text(f"{front}{markdown()}{behind}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

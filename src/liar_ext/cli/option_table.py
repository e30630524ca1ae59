"""Options that a command has a table of: how they are added to a parser, and which were given."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# option, as the field of what it becomes -> (type, metavar, help)
Options = Mapping[str, tuple[Any, str, str]]


def add_options(
    group: Any, options: Options, prefix: str = "", required: Sequence[str] = ()
) -> None:
    """The options of a table, each `--` and its name with hyphens; none has a default.

    Args:
        group: of a parser, or the parser; prefix: of all names; required: those that have to be
            given.
    """
    for name, (kind, metavar, text) in options.items():
        group.add_argument(
            f"--{prefix}{name}".replace("_", "-"),
            type=kind,
            metavar=metavar,
            help=text,
            required=name in required,
        )


def given_of(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of some options that were given, with their values; flags that were set are."""
    found = {name: getattr(arguments, name) for name in names}
    # not `in`: 0 is a value, and equals False
    return {n: value for n, value in found.items() if value is not None and value is not False}

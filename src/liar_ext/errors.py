"""The exceptions this package raises on purpose.

The command line prints an `InputError` as one line beginning `error:` and exits with 2; any
other exception exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LiarError(Exception):
    """Base of every error raised on purpose."""


class InputError(LiarError):
    """The user's input cannot be used. The message says what, which value, and what to do."""


class UnsupportedModelError(InputError):
    """The model is one this package refuses; the message names what is supported."""


class BackendError(InputError):
    """A backend was forced that cannot run here; the message says why."""


class NumericalError(LiarError):
    """No ridge on the ladder gave a usable factorisation."""


class OutOfMemory(LiarError):
    """Memory ran out; the message says in what, and which flag to lower."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal, after something was kept that `--resume` goes on from; says how much."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`; did you mean wanda?`, or nothing where no name is like it."""
    close = difflib.get_close_matches(str(value).lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_choice(option: str, value: Any, known: Iterable[str]) -> InputError:
    """The error of an option whose value is none of a list, with the one that may be meant."""
    names = list(known)
    return InputError(
        f"{option} {value}: choose from {', '.join(names)}{did_you_mean(value, names)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a GPU says so: torch has a type for the last one only."""
    says = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in says)
    )

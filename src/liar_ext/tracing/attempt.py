"""Running code of models that nobody has tried: what may come of it, and how that is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from liar_ext.errors import InputError

# the config means nothing, the code takes other arguments, or it asks for a package
REFUSALS = (
    *(InputError, ImportError, StrictDataclassError, ValueError, TypeError, RuntimeError),
    *(AssertionError, KeyError, AttributeError, IndexError, ZeroDivisionError, NotImplementedError),
)


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Say what was tried before what torch or transformers says of it.

    Raises:
        InputError: of one line; those of this package say what was tried themselves.
    """
    try:
        yield
    except InputError:
        raise
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what}: {type(error).__name__}: {reason}") from error

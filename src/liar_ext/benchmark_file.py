"""A file that `liar bench` wrote, for an option that takes one: it is of that kind and release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError


def read_benchmark(
    path: str | Path,
    where: str,
    *,
    benchmark: str,
    version: int,
    what: str,
    how: str,
    missing: str = "no such file",
) -> tuple[dict[str, Any], bytes]:
    """The JSON object of a file, and its bytes, to be told again by.

    Args:
        path: as the user gave it; where: the option and its value, which begin a message.
        benchmark, version: what the file has to say of itself.
        what: it is then, in words; how: to make one; missing: what is said where there is none.
    Raises:
        InputError: there is no such file, it cannot be read, or it is of something else.
    """
    try:
        content = Path(path).expanduser().read_bytes()
        data = json.loads(content)
    except FileNotFoundError as error:
        raise InputError(f"{where}: {missing}; {how}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}); {how}") from error
    if not isinstance(data, dict) or data.get("benchmark") != benchmark:
        raise InputError(f"{where}: is no {what}; {how}")
    if data.get("version") != version:
        raise InputError(
            f"{where}: version {data.get('version')!r}; this release reads {version}; {how}"
        )
    return data, content

"""What a page shows beside its folders: evaluations, a grid, measurements of serving. Read and
checked here; the schemas are those of the commands that write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError

if TYPE_CHECKING:
    from liar_ext.report.examples import Examples


@dataclass(frozen=True)
class Material:
    """Attributes:
    evaluations: objects as `liar eval --json` prints them.
    comparisons: as `liar compare` writes them to comparison.json.
    serves: as `liar bench serve --json FILE` writes them.
    examples: texts of the dense model beside those of the outputs; None where none were made.
    """

    evaluations: Sequence[Mapping[str, Any]] = ()
    comparisons: Sequence[Mapping[str, Any]] = ()
    serves: Sequence[Mapping[str, Any]] = ()
    examples: Examples | None = field(default=None)


def read_evaluations(path: str | Path, option: str = "--eval") -> list[dict[str, Any]]:
    """What `liar eval --json` printed: one evaluation or several, each with the dense model's in
    front where it was measured beside.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    data = _read(path, option)
    if isinstance(data, Mapping) and data.get("benchmark") == "serve":
        raise InputError(f"{option} {path}: is what `liar bench serve` wrote; give it with --serve")
    several = data.get("evaluations", [data]) if isinstance(data, Mapping) else [data]
    found: list[dict[str, Any]] = []
    try:
        for one in several if isinstance(several, list) else [several]:
            own = dict(checked_evaluation(one))
            beside = own.get("dense")
            if isinstance(beside, Mapping) and "value" in beside:
                found.append(dict(checked_evaluation(beside)))
            found.append(own)
    except InputError as error:
        raise InputError(f"{option} {path}: not what `liar eval --json` prints ({error})") from None
    return found


def checked_evaluation(one: Any) -> Mapping[str, Any]:
    """The evaluation; raises InputError where it has no source, metric or finite value."""
    if not isinstance(one, Mapping):
        raise InputError(f"evaluation {one!r}: must be an object as `liar eval --json` prints it")
    missing = [key for key in ("source", "metric", "value") if key not in one]
    if missing:
        raise InputError(
            f"evaluation {dict(one)!r:.100}: no {', '.join(missing)}; give what `liar eval --json` "
            "printed"
        )
    for name in ("value", "standard_error"):
        given = one.get(name)
        optional = name == "standard_error" and given is None
        if not optional and not finite(given):
            raise InputError(f"evaluation of {one['source']}: {name} {given!r} is no finite number")
    return one


def read_comparison(path: str | Path) -> dict[str, Any]:
    """The comparison.json of `liar compare`; a folder with one will do."""
    file = Path(path)
    file = file / "comparison.json" if file.is_dir() else file
    data = _read(file, "--compare")
    if not isinstance(data, dict) or not {"source", "cells", "dense", "evaluations"} <= data.keys():
        raise InputError(f"--compare {file}: not a comparison.json of `liar compare`")
    return data


def read_serve(path: str | Path) -> dict[str, Any]:
    """What `liar bench serve --json FILE` wrote; entries may lack what was not measured."""
    data = _read(path, "--serve")
    entries = data.get("entries") if isinstance(data, dict) else None
    named = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    )
    if not named or not entries or data.get("benchmark") != "serve":
        raise InputError(f"--serve {path}: not what `liar bench serve --json FILE` writes")
    return dict(data)


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: str | Path, option: str) -> Any:
    """A file of JSON, or the last line of what a command printed."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{option} {path}: cannot be read ({reason}); check the path") from error
    for part in (text, text.splitlines()[-1] if text else ""):
        try:
            return json.loads(part)
        except ValueError as error:
            problem = error
    raise InputError(f"{option} {path}: cannot be read as JSON ({problem})") from problem

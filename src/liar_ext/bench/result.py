"""What a benchmark's result begins with, and its file: looked at before anything is measured,
replaced whole."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from liar_ext.bench.measure import machine_state
from liar_ext.comparison.ledger import write_whole
from liar_ext.environment import environment
from liar_ext.errors import InputError


def head(
    benchmark: str, device: torch.device, before: Mapping[str, Any], note: str | None = None
) -> dict[str, Any]:
    """Of which benchmark, device and day a result is, the versions, and what else was going on.

    Args:
        before: `machine_state()` before anything was measured; this is called afterwards.
        note: the user's remark, of benchmarks that take one.
    """
    return {
        "benchmark": benchmark,
        "device": device.type,
        "date": datetime.date.today().isoformat(),
        "environment": environment(device),
        "machine": {"before": dict(before), "after": machine_state()},
        **({} if note is None else {"note": note}),
    }


def check_file(option: str, file: str) -> None:
    """Raises InputError for a file that cannot be written."""
    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise InputError(f"{option} {file}: {Path(file).parent} is not a folder")
    if path.is_dir():
        raise InputError(f"{option} {file}: is a folder; name a file in it")
    there = path.exists() and not _replaced(path)
    if not os.access(path if there else path.resolve().parent, os.W_OK):
        raise InputError(f"{option} {file}: may not be written")


def write_result(option: str, file: str, result: Mapping[str, Any]) -> None:
    """As JSON. The old file or the new one is there, whatever happens.

    Raises:
        InputError: the disk is full, or the like.
    """
    path = Path(file).absolute()
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    try:
        if _replaced(path):
            write_whole(path, text)
        else:
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {file}: cannot be written ({error})") from error


def _replaced(path: Path) -> bool:
    """Whether it is, or will be, a plain file; devices, pipes and links stay what they are."""
    return not os.path.lexists(path) or stat.S_ISREG(path.lstat().st_mode)

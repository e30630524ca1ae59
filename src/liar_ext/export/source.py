"""The folder that is exported or checked."""

from __future__ import annotations

from pathlib import Path

from liar_ext.checkpoint.load import resolve
from liar_ext.errors import InputError
from liar_ext.report.schema import EXPORTED, FILE, read_data

# a padded folder is a checkpoint like any other; what these have, transformers does not read
FOREIGN = ("deci", "gguf", "onnx")


def source_folder(source: str | Path) -> Path:
    """Where a source is.

    Raises:
        InputError: there is none, or it has been written for an engine already: said here, because
            what a loader finds missing in it is not what is wrong.
    """
    folder = resolve(source)
    data = read_data(folder) if (folder / FILE).exists() else None
    if isinstance(data, dict) and data.get("kind") == EXPORTED and data.get("format") in FOREIGN:
        raise InputError(
            f"{source}: was written by `liar export --format {data['format']}`, for "
            f"{data['export']['loads_with']}; give the folder that it was made from "
            f"({data['source']})"
        )
    return folder

"""Loading a folder as a user of stock transformers does."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import transformers
from liar_families import Family


class _Kept(logging.Handler):
    """Records of warnings and worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def stock(family: Family, folder: Path) -> Any:
    """As a user loads it; anything said about the weights is a failure."""
    logger, kept = transformers.logging.get_logger("transformers"), _Kept()
    # transformers does not propagate its records, so caplog never sees them
    logger.addHandler(kept)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = family.auto.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(kept)
    assert kept.lines == []
    assert {name: keys for name, keys in info.items() if keys} == {}
    return model.eval()

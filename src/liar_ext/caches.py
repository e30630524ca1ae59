"""What transformers calls keys and values: `cache` from 5.24 on, `past_key_values` before; the old
name is answered with a warning, and goes in 5.40."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

NEW, OLD = "cache", "past_key_values"


def cache_option(model: PreTrainedModel) -> str:
    """The option of a model that takes them; families changed one after another."""
    return NEW if NEW in inspect.signature(model.forward).parameters else OLD


def cache_of(output: Any) -> Any:
    """Those that a model's output has, None where it has none."""
    found = getattr(output, NEW, None)
    return getattr(output, OLD, None) if found is None else found

"""What layers may differ in: those that do in nothing but their number are looked at once."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from torch import nn

from liar_ext.checkpoint.reader import raw_bytes

_NUMBER = re.compile(r"(\w+_)?(idx|index|layer_id)")


def numbers_a_layer(name: str) -> bool:
    """Whether an attribute has the name of a place in the model (`layer_idx`)."""
    return _NUMBER.fullmatch(name) is not None


def signature(layer: nn.Module, number: int) -> str:
    """Modules, shapes of parameters, values of buffers, and settings, but for the layer's number.

    Args:
        number: of the layer; an attribute that holds another one is a setting, whatever its name.
    """
    parts = []
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if _is_plain(value) and not (numbers_a_layer(name) and value == number)
        }
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        buffers = {
            name: (
                str(b.dtype),
                tuple(b.shape),
                hashlib.sha256(raw_bytes(b.contiguous())).hexdigest(),
            )
            for name, b in module.named_buffers(recurse=False)
        }
        parts.append((path, type(module).__name__, settings, shapes, buffers))
    return repr(parts)


def _is_plain(value: Any) -> bool:
    """Whether the value's text says all of it."""
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, int | float | str | None)

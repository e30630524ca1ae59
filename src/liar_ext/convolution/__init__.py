"""Convolutional networks with fewer activations and convolutions: what lies between two activations
that stay is one convolution (LayerMerge), refitted by least squares.

`fuse` goes from folder to folder; `algebra` has the convolutions, `plan` the choice of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liar_ext.convolution.chain import Segment, chain_of
    from liar_ext.convolution.run import fuse
    from liar_ext.convolution.settings import FuseSettings

# resolved on first use: the command line needs the settings for its help, and no torch
_HOMES = {
    "FuseSettings": "settings",
    "Segment": "chain",
    "chain_of": "chain",
    "fuse": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'liar_ext.convolution' has no attribute {name!r}")
    return getattr(importlib.import_module(f"liar_ext.convolution.{_HOMES[name]}"), name)


__all__ = ["FuseSettings", "Segment", "chain_of", "fuse"]

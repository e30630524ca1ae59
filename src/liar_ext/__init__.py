"""liar-ext: shrink Hugging Face transformers without retraining, repaired in closed form.

    report = liar_ext.prune(model, batches, liar_ext.Recipe(sparsity=0.3))   # in memory, in place
    report = liar_ext.compress("path/or/hub-id", "out", recipe)              # layer by layer
    model = liar_ext.load("out")

Importing this touches no GPU and imports neither Triton nor the compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from liar_ext._version import __version__

if TYPE_CHECKING:
    from liar_ext import ops
    from liar_ext.checkpoint.load import load
    from liar_ext.engine.api import prune, save
    from liar_ext.engine.compress import compress
    from liar_ext.engine.execution import Execution
    from liar_ext.errors import InputError, LiarError, NumericalError, UnsupportedModelError
    from liar_ext.presets import preset
    from liar_ext.recipe import Recipe
    from liar_ext.report.schema import Report

# resolved on first use: `import liar_ext` alone costs neither torch nor transformers
_HOMES = {
    "load": "liar_ext.checkpoint.load",
    "compress": "liar_ext.engine.compress",
    "Execution": "liar_ext.engine.execution",
    "prune": "liar_ext.engine.api",
    "save": "liar_ext.engine.api",
    "preset": "liar_ext.presets",
    "InputError": "liar_ext.errors",
    "LiarError": "liar_ext.errors",
    "NumericalError": "liar_ext.errors",
    "UnsupportedModelError": "liar_ext.errors",
    "Recipe": "liar_ext.recipe",
    "Report": "liar_ext.report.schema",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("liar_ext.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'liar_ext' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = [
    "Execution",
    "InputError",
    "LiarError",
    "NumericalError",
    "Recipe",
    "Report",
    "UnsupportedModelError",
    "__version__",
    "compress",
    "load",
    "ops",
    "preset",
    "prune",
    "save",
]

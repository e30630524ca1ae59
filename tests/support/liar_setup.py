"""setup.py as a module, for the tests of what it builds and of what nvcc makes of csrc/."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_setup() -> ModuleType:
    """A fresh copy each time: tests change it. It builds only when it is run."""
    spec = importlib.util.spec_from_file_location("liar_setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

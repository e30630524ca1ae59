"""Reconstructions by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.reconstruction.base import Reconstruction, Repaired, Task
from liar_ext.reconstruction.bias import BIAS
from liar_ext.reconstruction.liar import LIAR
from liar_ext.reconstruction.none import NONE

RECONSTRUCTIONS: dict[str, Reconstruction] = {r.name: r for r in (NONE, BIAS, LIAR)}

__all__ = ["RECONSTRUCTIONS", "Reconstruction", "Repaired", "Task"]

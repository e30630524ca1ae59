"""Reconstructions by name. To add one: a file beside this, a line here, a page in docs/methods/."""

from liar_ext.reconstruction.admm import ADMM
from liar_ext.reconstruction.base import Fit, Reconstruction, Repaired, Task
from liar_ext.reconstruction.bias import BIAS
from liar_ext.reconstruction.liar import LIAR
from liar_ext.reconstruction.mask_tuning import MASK_TUNING
from liar_ext.reconstruction.none import NONE
from liar_ext.reconstruction.rotation import ROTATIONS

RECONSTRUCTIONS: dict[str, Reconstruction] = {
    reconstruction.name: reconstruction
    for reconstruction in (NONE, BIAS, MASK_TUNING, *ROTATIONS, ADMM, LIAR)
}

__all__ = ["RECONSTRUCTIONS", "Fit", "Reconstruction", "Repaired", "Task"]

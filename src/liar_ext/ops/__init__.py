"""The ops: Gram accumulation, interpolation, and what a repair leaves over."""

from liar_ext.ops.gram import gram, gram_reference
from liar_ext.ops.interpolate import (
    Interpolation,
    Repair,
    interpolate,
    interpolate_reference,
    repair,
)
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.ops.residual import relative_residual, residual_reference
from liar_ext.ops.solve import Diagnostics

__all__ = [
    "ColumnMoments",
    "Diagnostics",
    "Interpolation",
    "Moments",
    "Repair",
    "gram",
    "gram_reference",
    "interpolate",
    "interpolate_reference",
    "relative_residual",
    "repair",
    "residual_reference",
]

"""The ops: Gram and cross moments, packing, cosines of rows, ridge solves, interpolation and its
residual."""

# these register implementations
import liar_ext.ops.factor
import liar_ext.ops.gram_cuda
import liar_ext.ops.solve_cuda  # noqa: F401
from liar_ext.ops.attempt import Attempt, attempt, attempt_reference
from liar_ext.ops.cosine import row_cosines, row_cosines_reference
from liar_ext.ops.cross import CrossMoments, cross, cross_reference
from liar_ext.ops.diagnostics import Diagnostics
from liar_ext.ops.drift import Drift, drift_reference, drift_residual_reference
from liar_ext.ops.gram import gram, gram_reference
from liar_ext.ops.interpolate import (
    Interpolation,
    Repair,
    interpolate,
    interpolate_reference,
    inverse_moments,
    repair,
)
from liar_ext.ops.moments import ColumnMoments, Moments
from liar_ext.ops.pack import pack, pack_reference
from liar_ext.ops.residual import relative_residual, residual_reference
from liar_ext.ops.solve import Solved, solve

__all__ = [
    "Attempt",
    "ColumnMoments",
    "CrossMoments",
    "Diagnostics",
    "Drift",
    "Interpolation",
    "Moments",
    "Repair",
    "Solved",
    "attempt",
    "attempt_reference",
    "cross",
    "cross_reference",
    "drift_reference",
    "drift_residual_reference",
    "gram",
    "gram_reference",
    "interpolate",
    "interpolate_reference",
    "inverse_moments",
    "pack",
    "pack_reference",
    "relative_residual",
    "repair",
    "residual_reference",
    "row_cosines",
    "row_cosines_reference",
    "solve",
]

"""Layers inserted between layers (LESA): predicted from their neighbours, then trained if asked.

`placement` says where, `parts` what a layer is made of, `basis` finds the coefficients of its
matrices in a basis that all layers share, `mlp` and `ridge` learn to predict them, `predictors`
lists these beside baselines, `write` goes from file to file, `training` trains what is new.
"""

from liar_ext.depth.grow.predictors import PREDICTORS, Predictor
from liar_ext.depth.grow.run import Growth, grow

__all__ = ["PREDICTORS", "Growth", "Predictor", "grow"]

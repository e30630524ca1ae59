"""Convolutional networks with fewer activations and convolutions: what lies between two activations
that stay is one convolution (LayerMerge), refitted by least squares.

`fuse` goes from folder to folder; `algebra` has the convolutions, `plan` the choice of them.
"""

from liar_ext.convolution.chain import Segment, chain_of
from liar_ext.convolution.run import fuse
from liar_ext.convolution.settings import FuseSettings

__all__ = ["FuseSettings", "Segment", "chain_of", "fuse"]

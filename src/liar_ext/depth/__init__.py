"""Whole layers: which to keep, and models and checkpoints of those that are kept."""

from liar_ext.depth.config import remapped
from liar_ext.depth.drop import drop_layers
from liar_ext.depth.surgery import surgery

__all__ = ["drop_layers", "remapped", "surgery"]

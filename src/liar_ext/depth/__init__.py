"""Whole layers: which to keep, and models and checkpoints of those that are kept."""

from liar_ext.depth.config import remapped
from liar_ext.depth.drop import drop_layers
from liar_ext.depth.merge import merge
from liar_ext.depth.merge_folder import merge_layers
from liar_ext.depth.merge_settings import MergeSettings
from liar_ext.depth.surgery import surgery

__all__ = ["MergeSettings", "drop_layers", "merge", "merge_layers", "remapped", "surgery"]

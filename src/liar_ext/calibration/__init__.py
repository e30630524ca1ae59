"""Text and token files to batches of calibration tokens."""

from liar_ext.calibration.batches import Batch, Calibration, check_enough, make_batches
from liar_ext.calibration.sources import Corpus, read

__all__ = ["Batch", "Calibration", "Corpus", "check_enough", "make_batches", "read"]

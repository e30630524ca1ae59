"""Text and token files to batches of calibration tokens."""

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration, check_enough, make_batches
from liar_ext.calibration.sources import Corpus, read

__all__ = ["Batch", "Calibration", "Corpus", "check_enough", "make_batches", "read"]

"""Training a little: chosen parameters of a model, on windows of tokens, with any loss."""

from liar_ext.recovery.language import next_token_loss, windows_of
from liar_ext.recovery.schedule import Schedule
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import TextTraining
from liar_ext.recovery.train import Loss, Training, train

__all__ = [
    "Loss",
    "Schedule",
    "TextTraining",
    "Training",
    "TrainingState",
    "next_token_loss",
    "train",
    "windows_of",
]

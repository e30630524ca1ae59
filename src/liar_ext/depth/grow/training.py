"""Continual pre-training of inserted layers alone: the layers that were there are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from liar_ext.calibration.sources import Corpus
from liar_ext.checkpoint.load import load
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.engine.progress import Progress
from liar_ext.recovery.language import next_token_loss
from liar_ext.recovery.state import TrainingState
from liar_ext.recovery.text import TextTraining, Trained, draw, train_on_text


def train_layers(
    folder: Path,
    parameters: Sequence[str],
    corpus: Corpus,
    training: TextTraining,
    *,
    device: str,
    state: TrainingState,
    progress: Progress,
) -> Trained:
    """Train some parameters of a checkpoint on the next tokens of a text; writes nothing.

    The model is in eval mode, without dropout. On a CPU it is float32, elsewhere what the files
    have; what is trained is float32 until the end.

    Raises:
        InputError: as `draw`, `next_token_loss` and `train_on_text`.
    """
    place = resolve_device(device)
    model = load(folder, dtype=compute_dtype("auto", place), device=place)
    stored = CheckpointReader(folder)
    stored.bind(model)
    return train_on_text(
        model,
        {name: name for name in parameters},
        stored,
        draw(folder, model, training, corpus),
        next_token_loss(model),
        training.schedule,
        state=state,
        progress=progress,
    )

"""Training on images with the loop that trains on tokens: an image is a window of one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.convolution.images import Images
from liar_ext.convolution.settings import FuseSettings
from liar_ext.engine.progress import Progress
from liar_ext.recovery.schedule import Schedule
from liar_ext.recovery.train import Loss, train


def finetune(
    model: PreTrainedModel,
    images: Sequence[Images],
    settings: FuseSettings,
    steps: int,
    *,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cross-entropy on labelled images, in place, in eval mode: what batch norms are left keep
    their statistics.

    `recovery.train` draws windows of tokens and hands them to a loss. Here a window is the number
    of an image, so that its schedule, clipping and checks hold as they are.

    Args:
        images: batches; all of them are drawn from. only: parameters; None for all.
    Returns:
        steps, log and schedule, for the report.
    """
    pixels = torch.cat([batch.pixels for batch in images])
    labels = torch.cat([batch.labels for batch in images])
    if only is not None and not only:
        return {"steps": 0}

    def loss(batch: Batch) -> Loss:
        rows = batch.input_ids[:, 0].to(labels.device)
        logits = model(pixel_values=pixels[rows]).logits
        total = functional.cross_entropy(logits.float(), labels[rows], reduction="sum")
        return Loss(total, len(rows))

    numbers = torch.arange(len(labels))[:, None]
    schedule = Schedule(
        steps,
        learning_rate=settings.learning_rate,
        batch_size=min(settings.batch_size, len(labels)),
        seed=settings.seed,
    )
    names = [name for name, _ in model.named_parameters()] if only is None else list(only)
    windows = Batch(numbers, torch.ones_like(numbers, dtype=torch.bool))
    found = train(model, names, windows, loss, schedule, progress=progress)
    told = {name: value for name, value in asdict(found).items() if name != "tokens"}
    return {**told, "images": found.tokens, "schedule": schedule.to_json()}

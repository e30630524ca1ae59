"""What a compression is compared with: one plain forward over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import given
from liar_ext.models import adapter_for


@torch.no_grad()
def plain_forward(model: PreTrainedModel, batches: Sequence[Batch], device: torch.device) -> None:
    """All batches through the headless model, for compression needs no head either; waits."""
    adapter = adapter_for(model.config)
    backbone = adapter.backbone(model)[1]
    options = adapter.options
    for batch in batches:
        backbone(**given(backbone, batch, device), **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)

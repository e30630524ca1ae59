"""Small convolutional networks with batch norms that have seen something, and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

LABELS, SIDE = 4, 32


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """Norms with scales, shifts and statistics that are not 1 and 0, as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            width = (module.num_features,)
            module.running_mean.copy_(torch.randn(width, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(width, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(width, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(width, generator=generator) * 0.1)
    return model.eval()


def resnet(**fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    values = {
        "num_channels": 1,
        "embedding_size": 6,
        "hidden_sizes": [6, 8],
        "depths": [2, 2],
        "layer_type": "basic",
        "num_labels": LABELS,
    }
    return settled(ResNetForImageClassification(ResNetConfig(**{**values, **fields})))


def mobilenet(**fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    values = {
        "num_channels": 1,
        "depth_multiplier": 0.1,
        "finegrained_output": False,
        "image_size": SIDE,
        "num_labels": LABELS,
    }
    model = MobileNetV2ForImageClassification(MobileNetV2Config(**{**values, **fields}))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # 52 convolutions that shrink what they are given leave nothing to compare
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn_like(module.weight) * (2.5 / fan_in) ** 0.5
    return settled(model)


def pictures(count: int = 48, channels: int = 1, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Smooth images of `LABELS` kinds, and which is which."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % LABELS
    coarse = torch.randn(LABELS, channels, 4, 4, generator=generator)
    noise = torch.randn(count, channels, 4, 4, generator=generator)
    small = coarse[labels] + 0.5 * noise
    return nn.functional.interpolate(small, size=side, mode="bilinear"), labels


def write_pictures(path: Path, count: int = 48) -> Path:
    pixels, labels = pictures(count)
    np.savez(path, images=pixels.numpy(), labels=labels.numpy())
    return path

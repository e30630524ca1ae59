"""Buffers that a checkpoint has: values as well, which no parameter holds."""

from __future__ import annotations

import torch
from torch import nn

from liar_ext.checkpoint.reader import CheckpointReader


def fill_buffers(
    model: nn.Module, reader: CheckpointReader, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Put a model's buffers on a device, with the checkpoint's values where it has them.

    One that is stored in the checkpoint's main dtype was made in the model's and is taken in
    `dtype`; any other (flags, numbers, tables kept in float32) keeps its own.
    """
    main = reader.main_dtype()
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if name in reader:
            stored = reader.get(name)
            buffer = stored.to(dtype) if stored.dtype == main else stored
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)

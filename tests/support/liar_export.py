"""Folders with given widths in every layer, without pruning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.writer import write_json
from liar_ext.models import adapter_for, layout


def shrunk(
    model: PreTrainedModel,
    folder: Path,
    widths: Sequence[dict[str, int]],
    biases: Sequence[str] = (),
) -> Path:
    """Save a dense model with the first units of its Sites alone, as pruning would write it.

    Args:
        widths: units of each layer; biases: kinds whose consumers are given one, random.
    """
    adapter, data = adapter_for(model.config), model.config.to_dict()
    dense = layout.read(model)
    generator = torch.Generator().manual_seed(5)
    for index, units in enumerate(widths):
        for site in adapter.sites_of(model, index, tuple(units)):
            if site.kind in biases:
                site.add_biases(filler=site.spec.bias_flag is not None)
                bias = site.bias()
                assert bias is not None
                bias.copy_(torch.randn(bias.shape, generator=generator))
            site.shrink(torch.arange(units[site.kind]))
    values = layout.equal_values(model, dense)
    found = layout.describe(data, adapter, list(widths), values, list(biases))
    # the dense config: a class may not accept the new one, which an alias of its family does
    model.save_pretrained(folder)
    write_json(folder / "config.json", found)
    return folder

"""`liar_ext.load`: every folder this package writes, and every dense one."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from liar_ext.checkpoint.buffers import fill_buffers
from liar_ext.checkpoint.matching import computed_in, tied_names
from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.errors import InputError
from liar_ext.models import layout


def resolve(source: str | Path, *, config_only: bool = False) -> Path:
    """A local folder, or the local copy of a hub repository (downloaded where there is network).

    Args:
        config_only: of a hub repository, fetch `config.json` alone.
    Raises:
        InputError: no such folder or repository, or it cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"{source}: no such folder; give one with config.json and weights, or a hub id, "
            "OWNER/NAME"
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if config_only:
            return Path(hf_hub_download(name, "config.json")).parent
        return Path(
            snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.h5", "*.msgpack"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source}: neither a folder nor a hub repository that can be reached ({reason})"
        ) from error


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a dense or pruned checkpoint as a stock transformers model, in eval mode.

    The model is of the stock class that the folder names; per-layer widths, or fewer heads than the
    family's config can state, come from the `liar_ext` key. Every tensor must be there.

    Args:
        dtype: of the parameters; None is the checkpoint's, where it is mixed the most frequent one.
    Raises:
        InputError: the folder is missing, incomplete, or of another release.
    """
    folder = resolve(source)
    reader = CheckpointReader(folder)
    model = layout.empty(reader.config)
    reader.bind(model)
    fill(model, reader, dtype or reader.main_dtype(), device)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = os.fspath(folder)
    return model.eval()


def fill(
    model: PreTrainedModel,
    reader: CheckpointReader,
    dtype: torch.dtype,
    device: torch.device | str,
    without: Collection[str] = (),
) -> None:
    """Give a model on `meta` its tensors.

    Args:
        reader: bound to it; dtype: of the parameters.
        without: parameters that stay on `meta`: what is not run is not read.
    """
    for name, parameter in list(model.named_parameters()):
        if name in reader and name not in without:
            tensor = reader.get(name).to(device, computed_in(model, name, dtype))
            _assign(model, name, tensor, parameter.requires_grad)
    fill_buffers(model, reader, device, dtype)
    if tied_names(model):
        model.tie_weights(recompute_mapping=False)


def _assign(model: nn.Module, name: str, value: torch.Tensor, trainable: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trainable))

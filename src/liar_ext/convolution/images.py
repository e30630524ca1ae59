"""Images and their labels, from a folder of folders or from a file of arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from liar_ext.calibration.media import (
    PREPROCESSOR,
    SUFFIXES,
    image_files,
    image_processor,
    pixels_of,
)
from liar_ext.errors import InputError

# images that are prepared at a time
PIECE = 64


@dataclass(frozen=True, eq=False)
class Images:
    """Attributes:
    pixels: (n, channels, h, w) float32, as the network takes them.
    labels: (n,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def at(self, rows: Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def batches(self, size: int) -> list[Images]:
        return [self.at(rows) for rows in torch.arange(len(self)).split(size)]

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """Most of them, and a fraction; in an order that the seed draws.

        Raises:
            InputError: too few for two parts.
        """
        count = max(1, round(len(self) * fraction))
        if len(self) - count < 2:
            raise InputError(
                f"--images: {len(self)} images are too few to hold {fraction:g} of them out; "
                "give more"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.at(order[count:]), self.at(order[:count])


def read_images(source: str | Path, folder: Path, config: PretrainedConfig) -> Images:
    """Read images for a classifier.

    Args:
        source: a folder with a folder of images for each class, prepared by the network's own
            image processor; or an .npz or .safetensors with `images` (n, channels, h, w), as the
            network takes them, and integer `labels` (n,).
        folder: of the network; config: its config.
    Raises:
        InputError: nothing there, images of another shape, NaN, or labels that it does not have.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _from_folder(path, folder, config)
    elif path.suffix in (".npz", ".safetensors"):
        found = _from_arrays(path)
    else:
        what = "is neither a folder nor an .npz or .safetensors" if path.exists() else "not found"
        raise InputError(f"--images {source}: {what}")
    _check(found, source, config)
    return found


def _check(found: Images, source: str | Path, config: PretrainedConfig) -> None:
    pixels, labels = found.pixels, found.labels
    if pixels.dim() != 4 or labels.shape != (len(pixels),) or not pixels.numel():
        raise InputError(
            f"--images {source}: images are {tuple(pixels.shape)} and labels "
            f"{tuple(labels.shape)}; give (n, channels, h, w) and (n,), each at least 1"
        )
    if pixels.shape[1] != config.num_channels:
        raise InputError(
            f"--images {source}: {pixels.shape[1]} channels, the network takes "
            f"{config.num_channels}"
        )
    if not bool(pixels.isfinite().all()):
        raise InputError(f"--images {source}: NaN or infinite pixels")
    low, high, known = int(labels.min()), int(labels.max()), config.num_labels or 0
    if low < 0 or high >= known:
        raise InputError(
            f"--images {source}: labels {low} to {high}, the network has 0 to {known - 1}"
        )


def _from_arrays(path: Path) -> Images:
    arrays: dict[str, Any]
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        else:
            arrays = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"--images {path}: not found") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--images {path}: cannot be read ({reason})") from error
    for name in ("images", "labels"):
        if name not in arrays:
            there = ", ".join(sorted(arrays)) or "nothing"
            raise InputError(f"--images {path}: has no array {name}, but {there}")
    pixels, labels = arrays["images"], arrays["labels"]
    if not pixels.is_floating_point():
        raise InputError(
            f"--images {path}: images are {pixels.dtype}; give floating point as the network takes "
            "them, scaled and normalised, or a folder of image files"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"--images {path}: labels are {labels.dtype}; give integers")
    return Images(pixels.float(), labels.long())


def _from_folder(path: Path, folder: Path, config: PretrainedConfig) -> Images:
    if not (folder / PREPROCESSOR).exists():
        raise InputError(
            f"{folder}: no {PREPROCESSOR}, so that nothing says how the network takes image files; "
            "give an .npz or .safetensors with images as it takes them"
        )
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {c.name: image_files(c) for c in classes}
    files = {name: found for name, found in files.items() if found}
    if not files:
        raise InputError(
            f"--images {path}: no folders of images ({', '.join(SUFFIXES)}), one for each class"
        )
    labels = _labels(list(files), path, config)
    processor = image_processor(folder)
    every = [(file, labels[name]) for name, found in files.items() for file in found]
    pieces = [
        pixels_of([file for file, _ in every[at : at + PIECE]], processor, "--images")
        for at in range(0, len(every), PIECE)
    ]
    return Images(torch.cat(pieces), torch.tensor([label for _, label in every]))


def _labels(names: Sequence[str], path: Path, config: PretrainedConfig) -> dict[str, int]:
    """Which label a folder's name is: the network's own names, or else their order."""
    known = {str(name): int(label) for name, label in (config.label2id or {}).items()}
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    if not any(name in known for name in names) and len(names) == config.num_labels:
        return {name: label for label, name in enumerate(names)}
    stray = next(name for name in names if name not in known)
    raise InputError(
        f"--images {path}: folder {stray!r} is none of the network's labels "
        f"({', '.join(list(known)[:5])}, ...), and there are {len(names)} folders for "
        f"{config.num_labels} labels"
    )

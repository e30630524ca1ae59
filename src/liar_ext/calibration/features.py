"""Calibration of models that read no tokens: images, or what a feature extractor makes of sound."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liar_ext.calibration.batch import Batch
from liar_ext.calibration.batches import Calibration, draw
from liar_ext.calibration.media import (
    SUFFIXES,
    feature_extractor,
    image_files,
    image_processor,
    pixels_of,
    sound_files,
    spectra_of,
)
from liar_ext.calibration.records import one_line
from liar_ext.errors import InputError

_OPTION = "--calibration"


def feature_batches(
    spec: str,
    folder: Path,
    name: str,
    *,
    shape: tuple[int, ...],
    length: int,
    samples: int,
    batch_size: int,
    seed: int,
) -> Calibration:
    """Choose samples by seed and batch them.

    Args:
        spec: a folder of images or of PCM .wav files, at any depth, which the model's own processor
            prepares; a `.safetensors` with a tensor `name`, or a `.npy`, (n, *shape) floating.
        folder: of the model; name: of the argument of its forward.
        shape: of a sample; length: hidden states that the model makes of one.
        samples: drawn without replacement; all are used when there are fewer.
    Raises:
        InputError: nothing there, not readable, another shape, NaN.
    """
    for flag, value in (("--samples", samples), ("--batch-size", batch_size)):
        if value < 1:
            raise InputError(f"{flag} {value} is too small; give at least 1")
    count, take = _source(Path(spec).expanduser(), spec, folder, name)
    ids = draw(count, samples, seed)
    values = take(ids)
    check_features(spec, name, values, shape)
    values = values.float()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.contiguous().numpy().tobytes())
    return Calibration(
        batches=tuple(Batch.of_features({name: own}, length) for own in values.split(batch_size)),
        source=spec,
        sha256=digest.hexdigest(),
        seed=seed,
        seq_len=length,
        requested=samples,
        sample_ids=tuple(ids),
        sketch=(),
    )


def check_features(what: str, name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Raises InputError unless these are (n, *shape), floating point and finite."""
    if values.shape[1:] != shape or not values.is_floating_point() or not len(values):
        raise InputError(
            f"{what}: {name} are {tuple(values.shape)} {values.dtype}; the model takes "
            f"(n, {', '.join(map(str, shape))}), floating point"
        )
    bad = (~torch.isfinite(values.flatten(1)).all(1)).nonzero()
    if len(bad):
        raise InputError(f"{what}: {name} of sample {int(bad[0])} are NaN or infinite")


def _source(
    path: Path, spec: str, folder: Path, name: str
) -> tuple[int, Callable[[Sequence[int]], Tensor]]:
    """How many samples there are, and what reads some of them."""
    if path.is_dir():
        return _folder(path, spec, folder, name)
    if not path.exists():
        raise InputError(f"{spec}: no such file or folder; check the path")
    if path.suffix == ".npy":
        values = _npy(spec, path)
    elif path.suffix == ".safetensors":
        values = _stored(spec, path, name)
    else:
        raise InputError(
            f"{spec}: is no folder of {'sounds' if name == 'input_features' else 'images'}, "
            f".safetensors or .npy, which hold {name}"
        )
    if not values.dim():
        raise InputError(f"{spec}: {name} is a single number; give (n, ...)")
    return len(values), lambda ids: values[list(ids)]


def _folder(
    path: Path, spec: str, folder: Path, name: str
) -> tuple[int, Callable[[Sequence[int]], Tensor]]:
    if name == "input_features":
        files, kind = sound_files(path), "PCM .wav files"
    else:
        files, kind = image_files(path), f"images ({', '.join(SUFFIXES)})"
    if not files:
        raise InputError(f"{spec}: has no {kind}")
    if name == "input_features":
        extractor = feature_extractor(folder)
        return len(files), lambda ids: spectra_of([files[i] for i in ids], extractor, _OPTION)
    processor = image_processor(folder)
    return len(files), lambda ids: pixels_of([files[i] for i in ids], processor, _OPTION)


def _npy(spec: str, path: Path) -> Tensor:
    try:
        # never unpickle: a calibration file must not be able to run code
        # mapped: a header may claim more than there is
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{spec}: not a .npy file of numbers ({one_line(error)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        kind = getattr(array, "dtype", "an archive")
        raise InputError(f"{spec}: holds {kind}; give floating point, as the model takes it")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _stored(spec: str, path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as stored:
            if name not in stored.keys():  # noqa: SIM118
                found = ", ".join(sorted(stored.keys())) or "nothing"
                raise InputError(f"{spec}: has no tensor {name!r} (found {found}); add it")
            return stored.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{spec}: not a safetensors file ({one_line(error)})") from error

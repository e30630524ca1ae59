"""Image and sound files, as a model's own processor takes them."""

from __future__ import annotations

import warnings
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liar_ext.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PREPROCESSOR = "preprocessor_config.json"
# of the first name, what processors of several kinds together write
PROCESSORS = (PREPROCESSOR, "processor_config.json")
# of a sample of PCM
_WIDTHS = {1: (np.uint8, 128, 128), 2: (np.int16, 0, 1 << 15), 4: (np.int32, 0, 1 << 31)}


def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def sound_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".wav")


def image_processor(folder: Path) -> Any:
    """Of a model's folder.

    Raises:
        InputError: it has none that is usable here.
    """
    from transformers import AutoImageProcessor

    return _processor(AutoImageProcessor, folder)


def feature_extractor(folder: Path) -> Any:
    """As `image_processor`, for sound."""
    from transformers import AutoFeatureExtractor

    return _processor(AutoFeatureExtractor, folder)


def _processor(auto: Any, folder: Path) -> Any:
    if not any((folder / name).exists() for name in PROCESSORS):
        raise InputError(
            f"{folder}: no {' or '.join(PROCESSORS)}, so that nothing says how the model takes "
            "files; give a .safetensors or .npy with its inputs"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a folder must not be able to run code, nor to ask for it
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder}: its processor is not usable ({reason}); copy {' or '.join(PROCESSORS)} "
            "from the original checkpoint again, or give a .safetensors or .npy with its inputs"
        ) from error


def pixels_of(files: Sequence[Path], processor: Any, option: str) -> Tensor:
    """(n, channels, h, w) float32.

    Raises:
        InputError: a file is no image; it begins with the option that named it.
    """
    from PIL import Image

    made = []
    for file in files:
        try:
            with Image.open(file) as image:
                opened = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            # what a damaged file makes of its decoder
            reason = " ".join(str(error).split())
            raise InputError(f"{option} {file}: cannot be read as an image ({reason})") from error
        # one at a time: 128 photographs of 12 megapixels are 6 GB as they are opened
        pixels = processor(images=[opened], return_tensors="pt")["pixel_values"]
        made.append(torch.as_tensor(pixels).float())
    shapes = {tuple(own.shape[1:]) for own in made}
    if len(shapes) > 1:
        raise InputError(
            f"{option}: the model's processor makes images of {len(shapes)} shapes, such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}; let it crop or resize to one"
        )
    return torch.cat(made)


def spectra_of(files: Sequence[Path], extractor: Any, option: str) -> Tensor:
    """What a feature extractor makes of PCM .wav files, (n, mel, frames) float32; the mean of their
    channels.

    Raises:
        InputError: a file is no such, or has another sampling rate than the extractor takes.
    """
    rate = extractor.sampling_rate
    made = [
        extractor([_wave(file, rate, option)], sampling_rate=rate, return_tensors="pt")
        for file in files
    ]
    return torch.cat([torch.as_tensor(own["input_features"]).float() for own in made])


def _wave(file: Path, rate: int, option: str) -> np.ndarray:
    try:
        with wave.open(str(file), "rb") as sound:
            own, width, channels = (
                sound.getframerate(),
                sound.getsampwidth(),
                sound.getnchannels(),
            )
            raw = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{option} {file}: cannot be read as a PCM .wav ({error})") from error
    if own != rate:
        raise InputError(
            f"{option} {file}: {own} samples a second, the model takes {rate}; resample it first"
        )
    if width not in _WIDTHS:
        raise InputError(f"{option} {file}: {8 * width} bits a sample; give 8, 16 or 32")
    kind, middle, most = _WIDTHS[width]
    # what was cut off in the middle of a sample is none
    raw = raw[: len(raw) - len(raw) % (width * channels)]
    values = (np.frombuffer(raw, kind).astype(np.float32) - middle) / most
    return values.reshape(-1, channels).mean(1)

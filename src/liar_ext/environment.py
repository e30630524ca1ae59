"""Versions and device: what a reader needs to judge or repeat a figure."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from liar_ext._version import __version__

PACKAGES = (
    "transformers",
    "safetensors",
    "tokenizers",
    "accelerate",
    "peft",
    "triton",
    "datasets",
    "numpy",
)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Plain data; missing packages are None."""
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "liar_ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "device": device_name(where),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

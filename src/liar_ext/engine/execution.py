"""Execution: how a compression runs, as opposed to what it computes; no choice here shows in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from liar_ext.engine.shelf import PLACES, DeviceShelf, DiskShelf, HostShelf, Shelf
from liar_ext.errors import InputError

# share of the free memory that hidden states and paused forwards may take before they move on
_SHARE = 0.6


@dataclass(frozen=True)
class Execution:
    """Attributes:

    hidden_states: where hidden states and paused forwards wait: `device`, `host` (pinned memory
        beside a GPU), `disk`, or `auto`, the first of them that has room.
    scratch: folder for them on disk; None is beside the output.
    journal_seconds: least time between two journal entries; 0 is after every layer.
    resume: go on with what an interrupted run left.
    moments: folder of Moments of the dense path, read if they are there and kept if not (only with
        `--statistics oneshot`).
    """

    hidden_states: str = "auto"
    scratch: Path | None = None
    journal_seconds: float = 30.0
    resume: bool = False
    moments: Path | None = None

    def __post_init__(self) -> None:
        if self.hidden_states not in ("auto", *PLACES):
            raise InputError(
                f"--hidden-states {self.hidden_states}: choose from auto, {', '.join(PLACES)}"
            )
        if not 0 <= self.journal_seconds < float("inf"):
            raise InputError(
                f"--journal-seconds {self.journal_seconds}: must be a number of at least 0"
            )
        if self.scratch is not None and not self.scratch.is_dir():
            raise InputError(f"--scratch {self.scratch}: no such folder")


def choose_place(wanted: str, needed: int, device: torch.device, processes: int = 1) -> str:
    """Where `needed` bytes of hidden states and paused forwards go.

    Args:
        wanted: `Execution.hidden_states`.
        processes: how many of them share the host's memory, each with as much.
    Raises:
        InputError: `host` without a GPU.
    """
    if wanted == "host" and device.type != "cuda":
        raise InputError("--hidden-states host: is memory beside a GPU; use device or disk")
    if wanted != "auto":
        return wanted
    on_device = needed if device.type == "cuda" else needed * processes
    if on_device <= _SHARE * free_bytes(device):
        return "device"
    on_host = needed * processes
    if device.type == "cuda" and on_host <= _SHARE * free_bytes(torch.device("cpu")):
        return "host"
    return "disk"


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on a device without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has cached is free, too
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo", encoding="ascii") as lines:
        found = dict(line.split(":", 1) for line in lines)
    available = int(found["MemAvailable"].split()[0]) * 1024
    # a container may have less than the machine
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        pass
    return max(available, 0)


def make_shelf(place: str, folder: Path, device: torch.device) -> Shelf:
    """The shelf for a place; `folder` exists and is this process's own."""
    if place == "disk":
        return DiskShelf(folder, device)
    return HostShelf(device) if place == "host" else DeviceShelf()

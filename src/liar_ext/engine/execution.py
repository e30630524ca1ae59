"""Execution: how a compression runs, as opposed to what it computes; no choice here shows in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from liar_ext.engine.shelf import PLACES, DeviceShelf, DiskShelf, HostShelf, Shelf
from liar_ext.errors import InputError, unknown_choice

# share of the free memory that hidden states and paused forwards may take before they move on
HELD_SHARE = 0.6


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
            raise unknown_choice("--hidden-states", self.hidden_states, ("auto", *PLACES))
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
    if on_device <= HELD_SHARE * free_bytes(device):
        return "device"
    # torch rounds pinned blocks up to powers of two
    on_host = 2 * needed * processes
    if device.type == "cuda" and on_host <= HELD_SHARE * free_bytes(torch.device("cpu")):
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
    return max(min([available, *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    """What the control groups of this process leave it: a container may have less than the machine.

    Of version 2 (`0::/path`) and 1 (`N:memory:/path`), the group and those above it.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group != root and root not in group.parents:
                break
            try:
                yield int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # no limit, or the group is not seen from here
                continue


def make_shelf(place: str, folder: Path, device: torch.device) -> Shelf:
    """The shelf for a place; `folder` exists and is this process's own."""
    if place == "disk":
        return DiskShelf(folder, device)
    return HostShelf(device) if place == "host" else DeviceShelf()

"""Which implementation of an op runs: a registry, one environment variable, no silent fallback.

An op registers its implementations with the reason why each cannot run somewhere. `select` takes
the first usable one of `PREFERENCE`; `LIAR_BACKEND` forces one, and a forced backend that cannot
run is an error that says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from liar_ext.errors import BackendError

NAMES = ("reference", "torch", "cpu", "triton", "cuda")

# tried in this order on each kind of device; `reference` is float64 and only ever forced
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

# why a backend cannot run on this device with this dtype, or None when it can
Obstacle = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op. `run` has the op's own signature."""

    op: str
    backend: str
    run: Callable[..., Any]
    unavailable: Obstacle


@dataclass(frozen=True)
class Status:
    """One line of `liar env`: `reason` says why a backend is not available, or is None."""

    op: str
    backend: str
    available: bool
    reason: str | None


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """The obstacle of implementations written in plain torch: none."""
    return None


def register(
    op: str, backend: str, unavailable: Obstacle = anywhere
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is the `backend` implementation of `op`."""
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}: use one of {', '.join(NAMES)}")

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY.setdefault(op, {})[backend] = Implementation(op, backend, run, unavailable)
        return run

    return add


def forced() -> str | None:
    """The backend that `LIAR_BACKEND` names, or None.

    Raises:
        BackendError: it names no backend.
    """
    name = os.environ.get("LIAR_BACKEND", "").strip()
    if name and name not in NAMES:
        raise BackendError(f"LIAR_BACKEND={name}: not a backend; use one of {', '.join(NAMES)}")
    return name or None


def select(op: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation of `op` to run on `device` with `dtype`.

    Raises:
        BackendError: the backend that `LIAR_BACKEND` forces cannot run here, or none can.
    """
    name = forced()
    if name is not None:
        if reason := obstacle(op, name, device, dtype):
            raise BackendError(f"LIAR_BACKEND={name} cannot run {op} on {device} {dtype}: {reason}")
        return _REGISTRY[op][name]
    reasons = []
    for candidate in PREFERENCE.get(device.type, ("torch",)):
        reason = obstacle(op, candidate, device, dtype)
        if reason is None:
            return _REGISTRY[op][candidate]
        reasons.append(f"{candidate}: {reason}")
    raise BackendError(f"no backend can run {op} on {device} {dtype} ({'; '.join(reasons)})")


def obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on `device` with `dtype`, or None when it can."""
    implementation = _REGISTRY.get(op, {}).get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    return implementation.unavailable(device, dtype)


def describe(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[Status]:
    """Every op and backend with its state on `device` (default: the GPU if there is one)."""
    # ops register themselves when they are imported
    import liar_ext.ops  # noqa: F401

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op in sorted(_REGISTRY):
        for backend in NAMES:
            reason = obstacle(op, backend, where, dtype)
            rows.append(Status(op, backend, reason is None, reason))
    return rows

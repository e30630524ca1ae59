"""Which implementation of an op runs: a registry, one environment variable, no silent fallback.

An op registers its implementations with the reason why each cannot run somewhere. `select` takes
the first usable one of `PREFERENCE`; `LIAR_BACKEND` forces one (`forced`), and a forced backend
that cannot run is an error that says why.

On a GPU an implementation of this package is used only after it has passed its self-test there: a
small case against float64, once for each device and dtype. A driver, a compiler or a device that
it was never run on is then a reason in `liar env`, not a wrong checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liar_ext.errors import BackendError

NAMES = ("reference", "torch", "cpu", "triton", "cuda")

# tried in this order on each kind of device; `reference` is float64 and only ever forced
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}

# why a backend cannot run on this device with this dtype, or None when it can
Obstacle = Callable[[torch.device, torch.dtype], str | None]

# relative error of an implementation on a small case, on this device with this dtype, and its bound
SelfTest = Callable[[Callable[..., Any], torch.device, torch.dtype], tuple[float, float]]


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        run: has the op's own signature.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    unavailable: Obstacle
    self_test: SelfTest | None = None


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
    op: str,
    backend: str,
    unavailable: Obstacle = anywhere,
    *,
    self_test: SelfTest | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is the `backend` implementation of `op` (see Implementation)."""
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}: use one of {', '.join(NAMES)}")

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        made = Implementation(op, backend, run, unavailable, self_test)
        _REGISTRY.setdefault(op, {})[backend] = made
        return run

    return add


def forced(op: str) -> str | None:
    """The backend that `LIAR_BACKEND` forces on `op`, or None.

    `LIAR_BACKEND=triton` forces it on every op that has it, and leaves the others to `PREFERENCE`;
    `LIAR_BACKEND=gram=triton,solve=torch` says it op by op, which goes before a name alone.

    Raises:
        BackendError: it names no backend or no op, or says the same thing twice.
    """
    text = os.environ.get("LIAR_BACKEND", "").strip()
    if not text:
        return None
    said: dict[str, str] = {}
    for part in text.split(","):
        known, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            known, name = "", known
        if name not in NAMES:
            raise BackendError(
                f"LIAR_BACKEND={text}: {name!r} is no backend; use one of {', '.join(NAMES)}"
            )
        if known and known not in _REGISTRY:
            raise BackendError(
                f"LIAR_BACKEND={text}: {known} is no op; use one of {', '.join(sorted(_REGISTRY))}"
            )
        if known in said:
            raise BackendError(f"LIAR_BACKEND={text}: {known or 'all ops'} twice")
        said[known] = name
    everywhere = said.get("")
    return said.get(op) or (everywhere if everywhere in _REGISTRY.get(op, {}) else None)


def select(op: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The implementation of `op` to run on `device` with `dtype`.

    Raises:
        BackendError: the backend that `LIAR_BACKEND` forces cannot run here, or none can.
    """
    name = forced(op)
    if name is not None:
        if reason := obstacle(op, name, device, dtype):
            setting = os.environ["LIAR_BACKEND"]
            raise BackendError(
                f"LIAR_BACKEND={setting} cannot run {op} on {device} {dtype}: {reason}"
            )
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
    reason = implementation.unavailable(device, dtype)
    if reason is None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        reason = _failed_self_test(implementation, torch.device("cuda", index), dtype)
    return reason


# what a self-test found, by implementation, device and dtype: None when it passed
_TESTED: dict[tuple[Implementation, torch.device, torch.dtype], str | None] = {}


def _failed_self_test(
    implementation: Implementation, device: torch.device, dtype: torch.dtype
) -> str | None:
    key = (implementation, device, dtype)
    if implementation.self_test is None or key in _TESTED:
        return _TESTED.get(key)
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"{implementation.op} was never run on {device} with {dtype}: "
            "run it once before capturing it in a graph"
        )
    name = f"{implementation.backend} {implementation.op} on {device} {dtype}"
    reason = None
    try:
        error, bound = implementation.self_test(implementation.run, device, dtype)
    except torch.OutOfMemoryError:
        # says nothing about the implementation
        raise
    except Exception as problem:
        # whatever a compiler or a driver raises: the next backend is there for it
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        reason = f"its self-test failed: {first}"
    else:
        if not error <= bound:
            reason = f"its self-test is wrong: relative error {error:.1e}, bound {bound:.0e}"
    _TESTED[key] = reason
    if reason is not None:
        warnings.warn(f"{name}: {reason}; it is not used", RuntimeWarning, stacklevel=2)
    return reason


def describe(
    device: torch.device | str | None = None, dtypes: Sequence[torch.dtype] | None = None
) -> list[Status]:
    """Every op and backend with its state on `device` (default: the GPU if there is one).

    Args:
        dtypes: a backend is available if it is for all of these; None for float32, and on a GPU
            the others that ops are run with there.
    """
    # ops register themselves when they are imported
    import liar_ext.ops  # noqa: F401

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    every = dtypes or (
        (torch.float32, torch.bfloat16, torch.float16) if where.type == "cuda" else (torch.float32,)
    )
    rows = []
    for op in sorted(_REGISTRY):
        # the precision of a factorisation
        kinds = (torch.float64, torch.float32) if op == "solve" else every
        for backend in NAMES:
            reasons = (obstacle(op, backend, where, dtype) for dtype in kinds)
            reason = next((r for r in reasons if r is not None), None)
            rows.append(Status(op, backend, reason is None, reason))
    return rows

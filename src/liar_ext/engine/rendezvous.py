"""Rendezvous: how the ranks of one job find each other, and how all end when one of them fails.

A rank that fails leaves its reason in the key-value store of torchrun's agent, which outlives the
ranks. The others look there before and while they wait for a collective. A rank that dies without
a word closes its connections; on the same host its process is gone, too, and can be named.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from liar_ext.errors import InputError, Interrupted, LiarError

# a rank may wait this long for another one's solve, or for its checkpoint on a slow disk
TIMEOUT = timedelta(minutes=30)
# seconds between two looks at the store while waiting for a collective
LOOK_EVERY = 0.25
# seconds the others have to receive the last collective, or the reason of a failure, and to clean
# up: torchrun ends them with SIGTERM as soon as the first one has exited
LEAVE_WITHIN = 5.0
# seconds from a closed connection until the process that had it is seen to be gone
_DIES_WITHIN = 0.5
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILED, INTERRUPTED = "failed", "interrupted"

# a second job in one process must not meet the keys of the first; all ranks count alike
_jobs = itertools.count()


class RankError(LiarError):
    """Another rank failed or died, so this one stops as well."""


class RankInputError(RankError, InputError):
    """Another rank met input that cannot be used: exit code 2 on every rank."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is.

    Attributes:
        rank, size: 0 ≤ rank < size.
        local_rank: among those on this host; picks the GPU.
        local_size: how many there are on this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Self | None:
        """The place that torchrun's variables describe; None without them or for one process.

        Raises:
            InputError: some are missing, or they are no numbers in range.
        """
        if not any(name in variables for name in NEEDED[:3]) or variables.get("WORLD_SIZE") == "1":
            return None
        values = [variables.get(name, "") for name in NEEDED]
        numbers = [int(value) if value.isdecimal() else -1 for value in values]
        rank, size, local_rank, _, port = numbers
        if not values[3] or min(local_rank, port) < 0 or not 0 <= rank < size or port > 65535:
            raise InputError(
                " ".join(f"{name}={value}" for name, value in zip(NEEDED, values, strict=True))
                + ": start several processes with torchrun, or unset these variables for a single "
                "one"
            )
        # not every launcher says; all on one host is the careful guess: they share its memory
        local_size = variables.get("LOCAL_WORLD_SIZE", "")
        return cls(rank, size, local_rank, int(local_size) if local_size.isdecimal() else size)


class Rendezvous:
    """The other ranks of one job, as one of them sees them through the store.

    Args:
        timeout: the longest wait for another rank.
    Raises:
        InputError: nobody answers at MASTER_ADDR.
    """

    def __init__(self, place: Place, timeout: timedelta) -> None:
        self._place, self._timeout = place, timeout
        self._store = _connect(place.rank, timeout)

    def join(self, device: torch.device) -> str:
        """Wait for all ranks and make the process group; returns its backend.

        Raises:
            RankError: they do not all come.
            InputError: some have GPUs and some do not.
        """
        rank, size = self._place.rank, self._place.size
        self._store.set(f"process-{rank}", json.dumps([_machine(), os.getpid(), device.type]))
        # in Python first: making the group blocks in C++, deaf to signals, until all ranks came
        if not self.meet("joined", self._timeout.total_seconds()):
            raise RankError(f"not all of {size} ranks came within {self._timeout}")
        for other in range(size):
            if (kind := self._process(other)[2]) != device.type:
                raise InputError(
                    f"rank {rank} computes on {device.type} and rank {other} on {kind}; "
                    "all need the same, give --device cpu or run on hosts with GPUs"
                )
        backend, device_id = "gloo", None
        if device.type == "cuda":
            backend, device_id = "nccl", device
            torch.cuda.set_device(device)
            # errors as exceptions of wait(); torchrun asks for a watchdog that aborts instead
            os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_BLOCKING_WAIT": "1"}
        with self.peers():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self._store),
                rank=rank,
                world_size=size,
                timeout=self._timeout,
                device_id=device_id,
            )
        return backend

    def meet(self, key: str, seconds: float) -> bool:
        """Wait until all ranks came here, through the store only; False if some did not."""
        deadline = time.monotonic() + seconds
        with self.peers():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self._place.size:
                self.look()
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)
        return True

    def look(self) -> None:
        """Raise if a rank announced an error: one round trip, 0.05 ms on one host."""
        with self.peers():
            if self._store.check([FAILED]):
                raise self.announced() or RankError("a rank failed; its output says why")

    def announce(self, error: BaseException | str) -> None:
        """Leave the reason why this rank stops for the others; the first one of all ranks stays."""
        record = {
            "rank": self._place.rank,
            "text": _line(error),
            "input": isinstance(error, InputError),
        }
        with suppress(RuntimeError):  # the store is gone, and so are those who would read it
            self._store.compare_set(FAILED, "", json.dumps(record))

    def announced(self) -> RankError | None:
        """The error that another rank left, if the store still answers."""
        with suppress(RuntimeError):
            if self._store.check([FAILED]):
                record = json.loads(self._store.get(FAILED))
                if record["rank"] != self._place.rank:
                    kind = RankInputError if record["input"] else RankError
                    return kind(f"stopped because rank {record['rank']} failed: {record['text']}")
        return None

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Turn what torch raises when a peer or the store is gone into a RankError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost() from error

    def cause(self, error: BaseException) -> BaseException:
        """What ended this rank, from what was raised in it.

        Once another rank has failed, what fails here is a consequence: files that it removes, or
        the SIGTERM with which torchrun ends the survivors.
        """
        if isinstance(error, RankError):
            return error
        found = self.announced()
        if not isinstance(error, KeyboardInterrupt):
            same = found is not None and str(found).endswith(f": {_line(error)}")
            return error if found is None or same else found
        found = found or self._dead(0)
        if found is not None:
            # what is kept, from the rank that knows it
            found.args = ("; ".join(filter(None, (str(found), str(error)))),)
            return found
        with suppress(RuntimeError):
            self._store.compare_set(INTERRUPTED, "", str(self._place.rank))
        if self._place.rank and not str(error):
            return Interrupted("interrupted; rank 0 says what is kept")
        return error

    def leave(
        self, error: BaseException | None, device: torch.device, works: Sequence[Any]
    ) -> None:
        """Tell the others, then close the connections, which wakes those waiting for this rank."""
        with _undisturbed() if error is not None else nullcontext():
            self._leave(error, device, works)

    def _leave(
        self, error: BaseException | None, device: torch.device, works: Sequence[Any]
    ) -> None:
        # an interrupt is no reason of its own: mostly it is the agent ending the survivors
        if isinstance(error, Exception):
            if not isinstance(error, RankError):
                self.announce(error)
            self._let_all_hear()
        elif error is None:
            with suppress(RankError):
                self.meet("left", LEAVE_WITHIN)
        if not dist.is_initialized():
            return
        group: Any = dist.group.WORLD
        if not all(work.is_completed() for work in works):
            # its destructor waits for the collective, which waits for the peers: never run it
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        if error is not None and device.type == "cuda":
            group.abort()  # an orderly end of NCCL would wait for the peers
        else:
            dist.destroy_process_group()

    def _let_all_hear(self) -> None:
        """Wait a little until all ranks have heard of a failure, if one was announced."""
        deadline = time.monotonic() + LEAVE_WITHIN
        with suppress(RuntimeError):
            if not self._store.check([FAILED]):
                return
            self._store.add("heard", 1)
            while self._store.add("heard", 0) < self._place.size and time.monotonic() < deadline:
                time.sleep(0.01)

    def _lost(self) -> RankError:
        """Why a connection was closed, as far as it can be known."""
        found = self.announced()
        with suppress(RuntimeError):
            if found is None and self._store.check([INTERRUPTED]):
                rank = self._store.get(INTERRUPTED).decode()
                found = RankError(f"stopped because rank {rank} was interrupted")
        if found is None:
            found = self._dead(_DIES_WITHIN)
        return found or RankError("another rank died or stopped answering; its output says why")

    def _dead(self, within: float) -> RankError | None:
        """The error for a rank of this host that ended without a word, seen within seconds."""
        deadline = time.monotonic() + within
        with suppress(RuntimeError):
            if self._store.check([INTERRUPTED]):
                return None  # they end everywhere
            here, others = _machine(), {}
            for rank in range(self._place.size):
                if rank != self._place.rank and self._store.check([f"process-{rank}"]):
                    machine, process, _ = self._process(rank)
                    if here and machine == here:
                        others[rank] = process
            while True:
                for rank, process in others.items():
                    if _ended(process):
                        return RankError(
                            f"stopped because rank {rank} died without a word (killed, or out of "
                            "memory)"
                        )
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.02)
        return None

    def _process(self, rank: int) -> tuple[str, int, str]:
        """Machine, process id and device type of a rank that has come."""
        machine, process, kind = json.loads(self._store.get(f"process-{rank}"))
        return machine, process, kind


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No signal interrupts: the SIGTERM of torchrun must not hide the reason that is known."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _line(error: BaseException | str) -> str:
    """A reason in one line, with its type unless it is meant for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, str | LiarError) else f"{type(error).__name__}: {text}"


def _machine() -> str:
    """What processes have in common that see each other's ids; empty where nothing says."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _ended(process: int) -> bool:
    """Whether a process is gone, or only its exit code is left."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    # the name before it may hold anything, parentheses too
    return state.rpartition(")")[2].split()[0] in "ZX"


def _connect(rank: int, timeout: timedelta) -> Any:
    """The store at MASTER_ADDR under keys of this job: in torchrun's agent, else in rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            host, port, None, hosts, timeout, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"MASTER_ADDR={host}, MASTER_PORT={port}: {reason}; start the ranks with torchrun"
        ) from error
    # after a restart the agent still has the keys of the attempt that failed
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"liar/{attempt}/{next(_jobs)}", store)

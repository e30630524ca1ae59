"""Ranks: the processes of one compression, started by `torchrun`; NCCL on GPUs, Gloo on CPUs.

    with Ranks.from_environment("auto") as ranks:
        for index in ranks.share(len(batches)):
            gram(rows_of(batches[index]), out=moments)
        ranks.sum_triangle_(moments.gram)

Every rank makes the same calls in the same order; in a single process each is an identity. How they
find each other, and how all end when one fails, is in `rendezvous`; nothing else in this package
uses `torch.distributed`.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from liar_ext.engine.rendezvous import LOOK_EVERY, TIMEOUT, Place, Rendezvous
from liar_ext.errors import InputError

# flat buffers of `sum_triangle_`: long enough to run at the speed of the wire
BUFFER_BYTES = 128 << 20
# rows packed as one rectangle: each sends half of this many entries from above the diagonal, 0.6 %
# of a triangle of 11008 columns
TRIANGLE_ROWS = 64
# Gloo reduces a segment on one rank and hands it on: the same bits everywhere (tested). NCCL has
# several algorithms and promises nothing; there rank 0's sum is broadcast, 14 % more traffic with
# 8 ranks
SAME_BITS = ("gloo",)


class Ranks:
    """The processes that share one compression, as seen from one of them.

    A context manager. Leaving it normally waits for the other ranks; leaving it by an exception
    announces that to them. Every method that talks to them raises RankError if one failed or died,
    and ValueError for a tensor on another device. Nothing is recorded for autograd.

    Attributes:
        rank: this process, 0 ≤ rank < size.
        size: how many processes; `Ranks()` is a single one that never touches torch.distributed.
        local_size: how many of them share this host's memory.
        device: where this rank computes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.local_size = 0, 1, 1
        self.device = torch.device(device)
        self._timeout = TIMEOUT
        self._same_bits = True
        self._others: Rendezvous  # where size > 1
        self._works: list[Any] = []  # the dist.Work of the latest collective

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Self:
        """One process."""
        return cls(device)

    @classmethod
    def from_environment(cls, device_name: str = "auto", *, timeout: timedelta = TIMEOUT) -> Self:
        """The ranks that torchrun's variables describe, or a single process without them.

        Args:
            device_name: auto, cpu or cuda. Several ranks use `cuda:LOCAL_RANK` and NCCL, or Gloo.
            timeout: the longest wait for another rank.
        Raises:
            InputError: variables are missing or make no sense, fewer GPUs than local ranks, nobody
                answers at MASTER_ADDR. What one rank raises reaches the others.
        """
        place = Place.of(os.environ)
        if place is None:
            return cls(_device(device_name, None))
        if not dist.is_available() or dist.is_initialized():
            raise InputError(
                "torch.distributed is missing or initialised already; run a single process, or "
                "leave the process group to liar-ext"
            )
        ranks = cls()
        ranks.rank, ranks.size, ranks.local_size = place.rank, place.size, place.local_size
        ranks._timeout = timeout
        ranks._others = Rendezvous(place, timeout)
        try:
            ranks.device = _device(device_name, place.local_rank)
            ranks._same_bits = ranks._others.join(ranks.device) in SAME_BITS
        except BaseException as error:
            ranks._leave(error)
            raise
        return ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.size == 1:
            return
        if error is None:
            try:
                self.barrier()
            except BaseException as late:
                self._leave(late)
                raise
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """End this rank's part; raises the cause if `error` is only a consequence of it."""
        cause = None if error is None else self._others.cause(error)
        self._others.leave(cause, self.device, self._works)
        self._works = []
        if cause is not None and cause is not error:
            raise cause from error

    def share(self, count: int, rank: int | None = None) -> range:
        """The contiguous share of `count` items of a rank, by default of this one.

        Shares differ by one item at most; the first ranks have more.
        """
        rank = self.rank if rank is None else rank
        base, more = divmod(count, self.size)
        start = rank * base + min(rank, more)
        return range(start, start + base + (rank < more))

    def owner(self, index: int, count: int) -> int:
        """The rank with `index` in its `share(count)`. Raises IndexError outside 0 ≤ i < count."""
        if not 0 <= index < count:
            raise IndexError(f"item {index} of {count}")
        return next(r for r in range(self.size) if index < self.share(count, r).stop)

    def rows(self, total: int, rank: int | None = None) -> slice:
        """`share(total, rank)` as a slice: the output rows that a rank solves."""
        share = self.share(total, rank)
        return slice(share.start, share.stop)

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, any shape; the same bits on every rank. Returns `tensor`."""
        if self.size > 1 and tensor.numel():
            flat = self._here(tensor).contiguous()
            if self._same_bits:
                self._run(lambda: dist.all_reduce(flat, async_op=True))
            else:
                self._run(lambda: dist.reduce(flat, 0, async_op=True))
                self._run(lambda: dist.broadcast(flat, 0, async_op=True))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat)
        return tensor

    @torch.no_grad()
    def sum_triangle_(self, gram: Tensor) -> int:
        """Sum of lower triangles over ranks, in place: half the traffic of `sum_`.

        Args:
            gram: (n, s), s ≤ n. Entries with row ≥ column are summed, those above the diagonal are
                unspecified afterwards: the caller sets `Moments.mirrored` to False.
        Returns:
            how many entries were sent, about `s (n − s/2)`; 0 in a single process.
        """
        n, s = gram.shape
        if s > n:
            raise ValueError(f"({n}, {s}) is no lower triangle, nor its first columns")
        if self.size == 1 or gram.numel() == 0:
            return 0
        gram, sent = self._here(gram), 0
        room = max(s, min(BUFFER_BYTES // gram.element_size(), n * s))
        height = min(TRIANGLE_ROWS, room // s)
        blocks = [gram[i : i + height, : min(i + height, s)] for i in range(0, n, height)]
        buffer = gram.new_empty(room)
        while blocks:
            packed, used = [], 0
            while blocks and used + blocks[0].numel() <= room:
                block = blocks.pop(0)
                packed.append((block, buffer[used : used + block.numel()].view(block.shape)))
                used += block.numel()
            for block, copy in packed:
                copy.copy_(block)
            self.sum_(buffer[:used])
            for block, copy in packed:
                block.copy_(copy)
            sent += used
        return sent

    @torch.no_grad()
    def gather_rows(self, part: Tensor, total: int) -> Tensor:
        """The rows of all ranks on every rank, bit for bit.

        Args:
            part: (rows of `rows(total)`, ...), any dtype. The other sizes are the same on every
                rank, also on one without rows.
        Returns:
            (total, ...)
        """
        mine = self.rows(total)
        if part.shape[0] != mine.stop - mine.start:
            raise ValueError(f"{part.shape[0]} rows from rank {self.rank}, which has {mine}")
        if self.size == 1:
            return part
        whole = part.new_empty(total, *part.shape[1:])
        whole[mine] = self._here(part)
        self._exchange([whole[self.rows(total, rank)] for rank in range(self.size)])
        return whole

    @torch.no_grad()
    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, on every rank; anything pickle can carry."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self.device)
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = data.numel()
        pieces = [data.new_empty(length) for length in self.sum_(lengths).tolist()]
        pieces[self.rank] = data
        self._exchange(pieces)
        return [pickle.loads(piece.cpu().numpy().tobytes()) for piece in pieces]

    @torch.no_grad()
    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Rank `source`'s value on every rank; what the others give does not matter.

        A tensor arrives bit for bit, contiguous, on `device`; anything else is pickled.
        """
        if self.size == 1:
            return value
        sends = self.rank == source
        if sends and isinstance(value, Tensor):
            value = self._here(value).contiguous()
            self.gather((value.shape, value.dtype))
        else:
            content = self.gather((None, value) if sends else None)[source]
            if content[0] is None:
                return content[1]
            value = torch.empty(content[0], dtype=content[1], device=self.device)
        nothing = value.new_empty(0)
        self._exchange([value if rank == source else nothing for rank in range(self.size)])
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_(torch.ones(1, device=self.device))

    def same(self, name: str, value: Any) -> None:
        """Require that all ranks hold the same JSON-able `value`: a hash, versions, a recipe.

        Raises:
            InputError: on every rank, with `name`, rank 0's value and the first that differs.
        """
        values = self.gather(json.loads(json.dumps(value)))
        for rank, other in enumerate(values):
            if other != values[0]:
                first, second = _difference(values[0], other)
                raise InputError(
                    f"{name} is {first} on rank 0 and {second} on rank {rank}; all ranks need the "
                    "same files, options and versions"
                )

    def announce(self, error: BaseException | str) -> None:
        """Leave the reason why this rank stops for the others; the first one of all ranks stays."""
        if self.size > 1:
            self._others.announce(error)

    def _run(self, *starts: Callable[[], Any]) -> None:
        """Start collectives and wait for all of them.

        By polling: `wait()` sits in C++, where neither a signal nor an announcement gets through.
        """
        self._others.look()
        deadline = time.monotonic() + self._timeout.total_seconds()
        look, pause = time.monotonic() + LOOK_EVERY, 2e-5
        self._works = []
        with self._others.peers():
            for start in starts:
                self._works.append(start())
            for work in self._works:
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"no answer within {self._timeout}")
                    if time.monotonic() > look:
                        self._others.look()
                        look = time.monotonic() + LOOK_EVERY
                    time.sleep(pause)
                    pause = min(pause * 1.5, 5e-3)
                work.wait()

    def _exchange(self, pieces: list[Tensor]) -> None:
        """Send piece r, contiguous, from rank r to all others, in place.

        Broadcasts, as pieces differ in length: no padding and no second copy of the whole. They
        travel as bytes, so any dtype can and no bit changes.
        """
        flat = [piece.view(-1).view(torch.uint8) for piece in pieces]
        self._run(
            *(
                lambda piece=piece, rank=rank: dist.broadcast(piece, rank, async_op=True)
                for rank, piece in enumerate(flat)
                if piece.numel()
            )
        )

    def _here(self, tensor: Tensor) -> Tensor:
        if tensor.device != self.device:
            raise ValueError(f"a tensor on {tensor.device}; rank {self.rank} is on {self.device}")
        return tensor.detach()


def _device(name: str, local_rank: int | None) -> torch.device:
    """The device of a single process (`local_rank` None) or of one of several.

    Raises:
        InputError: no GPU, or more processes on this host than GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if local_rank is not None and local_rank >= count:
        raise InputError(
            f"LOCAL_RANK={local_rank}, and torch sees {count} GPUs here; use --device cpu or "
            f"torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda") if local_rank is None else torch.device("cuda", local_rank)


def _difference(first: Any, second: Any) -> tuple[str, str]:
    """Two different JSON values in short; of two objects only the keys that differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in first | second if first.get(key) != second.get(key)]
        first, second = ({k: v[k] for k in keys if k in v} for v in (first, second))
    return json.dumps(first)[:200], json.dumps(second)[:200]

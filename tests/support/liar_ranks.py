"""What each process of tests/engine/test_ranks.py runs, and how to start the processes.

As a script: `liar_ranks.py FOLDER SCENARIO` in torchrun's environment; rank r leaves its
observations in FOLDER/r.pt. One launch makes many checks, because starting costs seconds. The jobs
of a launch follow each other in the same processes: each failure is one `with Ranks...` block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from liar_ext.engine import ranks as module
from liar_ext.engine.ranks import Ranks
from liar_ext.errors import InputError, Interrupted, LiarError

SUM_SHAPES = ((), (1,), (7,), (3, 5), (10007,))
SUM_DTYPES = (torch.float32, torch.float64, torch.int64)
TRIANGLES = ((1, 1), (65, 65), (257, 257), (257, 100), (190, 3))
TOTALS = (0, 1, 3, 7, 10)
# loopback only, and one thread a rank as torchrun sets it
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}


def drawn(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What rank `rank` brings: reproducible, different for each rank, sums without cancellation."""
    generator = torch.Generator().manual_seed(100 + rank)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (values * 1000 + 500).to(dtype)


def launch(folder: Path, size: int, scenario: str, *, agent: bool = True) -> list[dict[str, Any]]:
    """Run a scenario in `size` processes; what each rank saw, a killed one until then.

    With `agent` the store lives here, as it does in torchrun's agent; else rank 0 has it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store  # the port is free again, for rank 0
    environment = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = str(agent)
    command = [sys.executable, __file__, str(folder), scenario]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    deadline = time.monotonic() + 100
    try:
        for process in processes:
            process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def save(seen: dict[str, Any]) -> None:
    torch.save(seen, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")


def observe(ranks: Ranks) -> dict[Any, Any]:
    """Every method, with odd sizes."""
    mine, size = ranks.rank, ranks.size
    seen: dict[Any, Any] = {}
    seen["place"] = (ranks.rank, ranks.size, str(ranks.device), dist.is_initialized())
    for exact in (True, False):
        ranks._same_bits = exact
        for shape in SUM_SHAPES:
            for dtype in SUM_DTYPES:
                key = ("sum", exact, shape, dtype)
                seen[key] = ranks.sum_(drawn(mine, *shape, dtype=dtype))
    ranks._same_bits = True
    seen["again"] = ranks.sum_(drawn(mine, 10007, dtype=torch.float32))
    seen["transposed"] = ranks.sum_(drawn(mine, 5, 3).T)
    seen["parameter"] = ranks.sum_(torch.nn.Parameter(drawn(mine, 4))).detach()
    seen["empty"] = ranks.sum_(torch.empty(0, 3))

    sent = 0
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.numel()
        return all_reduce(tensor, **options)

    for limit in (module.BUFFER_BYTES, 40_000):
        module.BUFFER_BYTES, before = limit, module.BUFFER_BYTES
        for n, s in TRIANGLES:
            for dtype in (torch.float64, torch.float32):
                gram = drawn(mine, n, s, dtype=dtype)
                gram[torch.ones(n, s).triu(1).bool()] = float("nan")
                dist.all_reduce, sent = counting, 0
                told = ranks.sum_triangle_(gram)
                dist.all_reduce = all_reduce
                seen["triangle", limit, n, s, dtype] = (gram.tril(), told, sent)
        module.BUFFER_BYTES = before

    for total in TOTALS:
        for dtype in (torch.float64, torch.bfloat16):
            part = drawn(0, total, 3, 2, dtype=dtype)[ranks.rows(total)]
            seen["rows", total, dtype] = ranks.gather_rows(part, total)
    strided = drawn(0, 5, 9).T[ranks.rows(9)]
    seen["strided"] = ranks.gather_rows(strided, 9)
    seen["gather"] = ranks.gather({"rank": mine, "text": "ü" * (mine * 50)})
    last = size - 1
    seen["object"] = ranks.broadcast({"from": mine}, last)
    for name, value in (("matrix", drawn(3, 3, 5).bfloat16().T), ("scalar", torch.tensor(7))):
        seen[name] = ranks.broadcast(value if mine == last else None, last)
    seen["nothing"] = ranks.broadcast(torch.empty(0, 4), 0)
    ranks.barrier()
    ranks.same("the recipe", {"seed": 1, "out": None})
    for name, value in (("scalar", mine == last), ("object", {"equal": 1, "seed": mine == last})):
        try:
            ranks.same("the calibration", value)
        except InputError as error:
            seen[f"differs {name}"] = str(error)
    return seen


@contextmanager
def failing(seen: dict[str, Any], name: str, *, device: str = "cpu") -> Iterator[Ranks]:
    """One job; seen[name] is (type of the error, its text, seconds until it was raised)."""
    raised = 0.0
    try:
        with Ranks.from_environment(device) as ranks:
            started = time.monotonic()
            try:
                yield ranks
            finally:
                raised = time.monotonic() - started
    except (Exception, KeyboardInterrupt) as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        seen[name] = (kinds, str(error), raised)


def fail(seen: dict[str, Any]) -> None:
    """The ways one rank ends a job, each seen by all ranks."""
    last = int(os.environ["WORLD_SIZE"]) - 1
    one = torch.ones(1)
    with failing(seen, "bad input") as ranks:
        if ranks.rank == last:
            time.sleep(0.3)
            raise InputError("shard 3\ncannot be read")
        ranks.sum_(one)
    with failing(seen, "slow to die") as ranks:
        if ranks.rank == 0:
            time.sleep(0.5)  # the others are inside the collective by then
            ranks.announce("disk full")
            ranks.announce("a later reason")
            time.sleep(2.5)
            raise LiarError("disk full")
        ranks.sum_(one)
    with failing(seen, "busy") as ranks:
        if ranks.rank == 0:
            raise ZeroDivisionError("by zero")
        time.sleep(0.5)
        ranks._run(lambda: seen.update({"busy entered": True}))
    with failing(seen, "interrupted") as ranks:
        if ranks.rank == 0:
            raise LiarError("a solve failed")
        time.sleep(0.5)
        raise KeyboardInterrupt
    with failing(seen, "consequence") as ranks:
        if ranks.rank == 0:
            raise LiarError("no room")
        time.sleep(0.5)
        raise FileNotFoundError("a folder that rank 0 has removed")
    with failing(seen, "all interrupted") as ranks:
        if ranks.rank == 0:
            raise Interrupted("interrupted after 2 of 4 layers")
        time.sleep(0.2 * ranks.rank)
        raise KeyboardInterrupt
    with failing(seen, "same") as ranks:
        raise InputError("it exists")
    with failing(seen, "at the end") as ranks:
        if ranks.rank == 0:
            time.sleep(0.3)
            raise LiarError("the last write failed")
    # a GPU that only one rank asks for, before there is a process group
    torch.cuda.is_available = lambda: False
    seen["early"] = ([], "", 0.0)
    try:
        Ranks.from_environment("cuda" if ranks.rank == last else "cpu")
    except LiarError as error:
        seen["early"] = ([kind.__name__ for kind in type(error).__mro__], str(error), 0.0)


def kill(seen: dict[str, Any], victim: int) -> None:
    with failing(seen, "killed") as ranks:
        ranks.barrier()
        if ranks.rank == victim:
            save(seen)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.sum_(torch.ones(1000))


def everything(seen: dict[str, Any]) -> None:
    with Ranks.from_environment("cpu") as ranks:
        seen.update(observe(ranks))
    seen["destroyed"] = not dist.is_initialized()
    fail(seen)
    kill(seen, ranks.size - 1)


def command_line(seen: dict[str, Any]) -> None:
    """What the command line does with errors: one line and an exit code. Run under torchrun."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Ranks.from_environment("cpu") as ranks:
            total = int(ranks.sum_(torch.tensor(ranks.rank + 1)))
            (Path(sys.argv[1]) / f"{ranks.rank}.sum").write_text(str(total))
            if ranks.rank == 1:
                raise InputError("shard 3 cannot be read")
            ranks.barrier()
    except (LiarError, KeyboardInterrupt) as error:
        text = f"{type(error).__name__}: {error}"
        (Path(sys.argv[1]) / f"{os.environ['RANK']}.error").write_text(text)
        sys.exit(2)


SCENARIOS: dict[str, Callable[[dict[str, Any]], None]] = {
    "everything": everything,
    "first rank dies": lambda seen: kill(seen, 0),
    "command line": command_line,
}

if __name__ == "__main__":
    observed: dict[str, Any] = {}
    SCENARIOS[sys.argv[2]](observed)
    save(observed)

"""Ranks: real processes with Gloo on loopback; what they run is in tests/support/liar_ranks.py.

One launch for each number of ranks serves all tests (`seen`): starting costs seconds.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import liar_ranks
import pytest
import torch
import torch.distributed as dist
from liar_ranks import SUM_DTYPES, SUM_SHAPES, TOTALS, TRIANGLES, drawn
from liar_testing import assert_close_rms

from liar_ext.engine import ranks as module
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.rendezvous import NEEDED, RankError, RankInputError
from liar_ext.errors import InputError, LiarError

SIZES = (2, 3, 4)
# a few roundings of the type for each of at most 4 summands
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-15, torch.int64: 0.0}
# the poll is every 0.25 s and a closed connection is seen at once; the machine may be busy
PROMPT = 8.0


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size}-ranks")
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, Any]]:
    """What each rank observed in the scenario "everything"; the last rank is killed at its end."""
    return liar_ranks.launch(tmp_path_factory.mktemp("ranks"), request.param, "everything")


def total(size: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return functools.reduce(torch.add, (drawn(r, *shape, dtype=dtype) for r in range(size)))


# one process


def test_a_single_process_gets_back_what_it_gives() -> None:
    with Ranks.single("cpu") as ranks:
        x = torch.randn(5, 3)
        before = x.clone()
        assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu"))
        assert ranks.sum_(x) is x and torch.equal(x, before)
        assert ranks.sum_triangle_(x) == 0 and torch.equal(x, before)
        assert ranks.gather_rows(x, 5) is x
        assert ranks.broadcast(x) is x and ranks.gather("a") == ["a"]
        assert (
            ranks.share(5) == range(5) and ranks.rows(5) == slice(0, 5) and ranks.owner(4, 5) == 0
        )
        ranks.barrier()
        ranks.same("the recipe", {"seed": 1})
        ranks.announce("nobody listens")
    assert not dist.is_initialized()


def test_an_error_leaves_a_single_process_unchanged() -> None:
    with pytest.raises(InputError, match="^mine$"), Ranks():
        raise InputError("mine")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 65])
def test_shares_are_a_partition_in_order(size: int, count: int) -> None:
    ranks = Ranks()
    ranks.size = size
    shares = [ranks.share(count, rank) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
    assert [ranks.owner(i, count) for i in range(count)] == [
        rank for rank, share in enumerate(shares) for _ in share
    ]
    assert [ranks.rows(count, r) for r in range(size)] == [slice(s.start, s.stop) for s in shares]
    with pytest.raises(IndexError):
        ranks.owner(count, count)


def test_shapes_that_no_triangle_or_share_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        Ranks().sum_triangle_(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="2 rows from rank 0"):
        Ranks().gather_rows(torch.zeros(2, 5), 3)


# torchrun's variables


def set_variables(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in NEEDED:
        monkeypatch.delenv(name, raising=False)
    for pair in text.split():
        monkeypatch.setenv(*pair.split("=", 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "WORLD_SIZE=1",
        "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
    ],
)
def test_without_several_ranks_it_is_a_single_process(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    set_variables(monkeypatch, text)
    ranks = Ranks.from_environment("cpu")
    assert (ranks.size, ranks.device.type) == (1, "cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "text",
    [
        "RANK=0",
        "WORLD_SIZE=2",
        "LOCAL_RANK=0",
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1",
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=29500",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "RANK=0 WORLD_SIZE=two LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=70000",
    ],
)
def test_half_set_variables_are_refused_with_their_values(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    set_variables(monkeypatch, text)
    with pytest.raises(InputError, match="torchrun") as raised:
        Ranks.from_environment("cpu")
    assert all(pair in str(raised.value) for pair in text.split())
    assert not dist.is_initialized()


def test_more_local_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert module._device("auto", 1) == torch.device("cuda", 1)
    assert module._device("cpu", 2) == torch.device("cpu")
    with pytest.raises(InputError, match=r"LOCAL_RANK=2.* 2 GPUs .*--nproc-per-node 2"):
        module._device("auto", 2)


def test_a_store_that_nobody_hosts_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    place = f"RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    set_variables(monkeypatch, place)
    with pytest.raises(InputError, match=f"MASTER_PORT={port}"):
        Ranks.from_environment("cpu", timeout=module.timedelta(seconds=1))


# collectives


def test_ranks_know_their_place_and_end_the_group(seen: list[dict[Any, Any]]) -> None:
    size = len(seen)
    for rank, view in enumerate(seen):
        assert view["place"] == (rank, size, "cpu", True)
        assert view["destroyed"]


@pytest.mark.parametrize("exact", [True, False], ids=["all-reduce", "reduce-and-broadcast"])
@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
def test_sums_have_the_same_bits_on_every_rank(
    seen: list[dict[Any, Any]], dtype: torch.dtype, exact: bool
) -> None:
    for shape in SUM_SHAPES:
        sums = [view["sum", exact, shape, dtype] for view in seen]
        assert all(torch.equal(sums[0], other) for other in sums)
        assert_close_rms(sums[0], total(len(seen), *shape, dtype=dtype), ROUNDING[dtype])


def test_sums_repeat_and_take_any_layout(seen: list[dict[Any, Any]]) -> None:
    size = len(seen)
    for view in seen:
        assert torch.equal(view["again"], view["sum", True, (10007,), torch.float32])
        assert_close_rms(view["transposed"], total(size, 5, 3).T, 1e-15)
        assert_close_rms(view["parameter"], total(size, 4), 1e-15)
        assert view["empty"].shape == (0, 3)


@pytest.mark.parametrize("limit", [module.BUFFER_BYTES, 40_000], ids=["one-buffer", "buffers"])
@pytest.mark.parametrize(("n", "s"), TRIANGLES)
def test_a_triangle_is_the_whole_sum_for_half_the_traffic(
    seen: list[dict[Any, Any]], n: int, s: int, limit: int
) -> None:
    for dtype in (torch.float64, torch.float32):
        views = [view["triangle", limit, n, s, dtype] for view in seen]
        whole = total(len(seen), n, s, dtype=dtype).tril()
        for triangle, told, sent in views:
            assert_close_rms(triangle, whole, ROUNDING[dtype])
            assert torch.equal(triangle, views[0][0])
            assert told == sent  # as counted at torch.distributed
            below = s * (s + 1) // 2 + (n - s) * s
            assert below <= sent <= below + s * module.TRIANGLE_ROWS / 2 + n


def test_a_large_triangle_costs_little_more_than_half() -> None:
    ranks = Ranks()
    ranks.size, ranks.sum_ = 2, lambda tensor: tensor
    sent = ranks.sum_triangle_(torch.zeros(5003, 5003))
    assert sent < 0.51 * 5003**2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", TOTALS)
def test_uneven_rows_arrive_bit_for_bit(
    seen: list[dict[Any, Any]], rows: int, dtype: torch.dtype
) -> None:
    for view in seen:
        assert torch.equal(view["rows", rows, dtype], drawn(0, rows, 3, 2, dtype=dtype))
        assert torch.equal(view["strided"], drawn(0, 5, 9).T)


def test_objects_and_tensors_arrive_from_where_they_were(seen: list[dict[Any, Any]]) -> None:
    size = len(seen)
    for view in seen:
        assert view["gather"] == [{"rank": r, "text": "ü" * (r * 50)} for r in range(size)]
        assert view["object"] == {"from": size - 1}
        assert torch.equal(view["matrix"], drawn(3, 3, 5).bfloat16().T)
        assert view["scalar"].shape == () and int(view["scalar"]) == 7
        assert view["nothing"].shape == (0, 4)


def test_a_difference_is_named_on_every_rank_with_both_values(seen: list[dict[Any, Any]]) -> None:
    last = len(seen) - 1
    for view in seen:
        assert (
            f"the calibration is false on rank 0 and true on rank {last};"
            in (view["differs scalar"])
        )
        assert (
            f'{{"seed": false}} on rank 0 and {{"seed": true}} on rank {last}'
            in (view["differs object"])
        )


# failures: (type names, text, seconds)


def assert_stopped(view: dict[Any, Any], job: str, text: str, within: float) -> None:
    kinds, message, seconds = view[job]
    assert "RankError" in kinds and "LiarError" in kinds
    assert message == text
    assert seconds < within, f"{job}: noticed after {seconds:.1f} s"


def test_bad_input_on_one_rank_is_bad_input_on_all(seen: list[dict[Any, Any]]) -> None:
    reason = f"stopped because rank {len(seen) - 1} failed: shard 3 cannot be read"
    for view in seen[:-1]:
        assert_stopped(view, "bad input", reason, 0.3 + PROMPT)
        assert "InputError" in view["bad input"][0]  # exit code 2
    assert seen[-1]["bad input"][1] == "shard 3\ncannot be read"


def test_blocked_ranks_notice_an_announcement_before_its_rank_is_gone(
    seen: list[dict[Any, Any]],
) -> None:
    assert seen[0]["slow to die"][1] == "disk full"
    for view in seen[1:]:
        # announced at 0.5 s, the connection closes at 3 s; the first reason stays
        assert_stopped(view, "slow to die", "stopped because rank 0 failed: disk full", 2.5)
        assert "InputError" not in view["slow to die"][0]


def test_a_busy_rank_notices_before_it_enters_a_collective(seen: list[dict[Any, Any]]) -> None:
    for view in seen[1:]:
        reason = "stopped because rank 0 failed: ZeroDivisionError: by zero"
        assert_stopped(view, "busy", reason, 0.5 + PROMPT)
        assert "busy entered" not in view


def test_what_fails_after_another_rank_is_reported_as_its_cause(seen: list[dict[Any, Any]]) -> None:
    for view in seen[1:]:
        reason = "stopped because rank 0 failed: no room"
        assert_stopped(view, "consequence", reason, 0.5 + PROMPT)


def test_an_interrupt_is_one_on_every_rank_and_says_what_is_kept(
    seen: list[dict[Any, Any]],
) -> None:
    assert seen[0]["all interrupted"][1] == "interrupted after 2 of 4 layers"
    for view in seen[1:]:
        kinds, text, _ = view["all interrupted"]
        assert "Interrupted" in kinds and text == "interrupted; rank 0 says what is kept"


def test_the_same_error_on_every_rank_stays_what_it_is(seen: list[dict[Any, Any]]) -> None:
    for view in seen:
        kinds, text, _ = view["same"]
        assert kinds[0] == "InputError" and text == "it exists"


def test_the_agents_sigterm_is_reported_as_its_cause(seen: list[dict[Any, Any]]) -> None:
    for view in seen[1:]:
        reason = "stopped because rank 0 failed: a solve failed"
        assert_stopped(view, "interrupted", reason, 0.5 + PROMPT)


def test_a_rank_that_is_done_waits_for_the_others_to_succeed(seen: list[dict[Any, Any]]) -> None:
    for view in seen[1:]:
        reason = "stopped because rank 0 failed: the last write failed"
        assert_stopped(view, "at the end", reason, 0.3 + PROMPT)


def test_a_failure_before_the_group_exists_reaches_all(seen: list[dict[Any, Any]]) -> None:
    last = len(seen) - 1
    for view in seen[:-1]:
        reason = f"stopped because rank {last} failed: --device cuda: torch sees no CUDA device"
        kinds, text, _ = view["early"]
        assert "RankInputError" in kinds and text.startswith(reason)


def test_a_killed_rank_ends_the_others_in_seconds(seen: list[dict[Any, Any]]) -> None:
    assert "killed" not in seen[-1]
    for view in seen[:-1]:
        last = len(seen) - 1
        reason = f"stopped because rank {last} died without a word (killed, or out of memory)"
        assert_stopped(view, "killed", reason, 0.3 + PROMPT)


def test_the_end_of_the_rank_with_the_store_ends_the_others(tmp_path: Path) -> None:
    seen = liar_ranks.launch(tmp_path, 2, "first rank dies", agent=False)
    reason = "another rank died or stopped answering; its output says why"
    assert_stopped(seen[1], "killed", reason, 0.3 + PROMPT)


def test_under_torchrun_every_rank_ends_with_the_first_reason(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += [liar_ranks.__file__, str(tmp_path), "command line"]
    environment = os.environ | liar_ranks.ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1  # torchrun's own code for a failed rank
    assert [(tmp_path / f"{rank}.sum").read_text() for rank in (0, 1)] == ["3", "3"]
    reason = "shard 3 cannot be read"
    assert (tmp_path / "1.error").read_text() == f"InputError: {reason}"
    stopped = f"RankInputError: stopped because rank 1 failed: {reason}"
    assert (tmp_path / "0.error").read_text() == stopped
    assert "exitcode  : 2" in done.stderr


def test_errors_are_ours() -> None:
    assert issubclass(RankError, LiarError) and not issubclass(RankError, InputError)
    assert issubclass(RankInputError, RankError) and issubclass(RankInputError, InputError)

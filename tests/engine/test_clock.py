"""The clock: phases on a GPU are measured by events, without draining it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from liar_ext.engine.clock import PHASES, Clock
from liar_ext.engine.compression import peak_host_bytes


def test_seconds_go_to_the_phase_they_were_spent_in():
    clock = Clock(torch.device("cpu"))
    with clock.phase("gram"):
        time.sleep(0.02)
    with clock.phase("load"):
        time.sleep(0.01)
    assert 0.02 <= clock.seconds["gram"] < 5
    assert 0.01 <= clock.seconds["load"] < 5
    assert set(clock.seconds) == set(PHASES)
    assert clock.seconds["forward"] == clock.seconds["solve"] == 0


def test_a_phase_on_a_gpu_is_timed_by_its_events_and_never_waits(monkeypatch):
    waited = []

    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1
            self.at = Event.made * 500.0  # milliseconds

        def record(self, stream):
            assert stream == "stream"

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("drained the device"))
    clock = Clock(torch.device("cuda", 0))
    for _ in range(3):
        with clock.phase("forward"):
            pass
    with clock.phase("load"):
        pass
    assert not waited
    assert clock.seconds["forward"] == pytest.approx(1.5)
    assert len(waited) == 3
    assert clock.seconds["forward"] == pytest.approx(1.5), "read again, not added again"
    assert Event.made == 6, "host phases need no event"


@pytest.mark.gpu
def test_the_device_s_time_is_counted_though_the_host_goes_on():
    clock = Clock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    with clock.phase("gram"):
        start = time.perf_counter()
        for _ in range(50):
            x @ x
        host = time.perf_counter() - start
    begin = time.perf_counter()
    torch.cuda.synchronize()
    total = time.perf_counter() - begin + host
    assert clock.seconds["gram"] == pytest.approx(total, rel=0.3)


def test_the_peak_is_this_process_s_and_not_what_started_it():
    """`ru_maxrss` of a child begins with what its parent held."""
    held = torch.ones(150 << 20, dtype=torch.uint8)
    script = (
        "from liar_ext.engine.compression import peak_host_bytes as peak\n"
        "before = peak()\n"
        "held = bytearray(b'x') * (64 << 20)\n"
        "print(before, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    before, more = map(int, done.stdout.split())
    here = peak_host_bytes()
    assert before < here - held.numel() // 2, "the child knows nothing of these 150 MB"
    assert 50 << 20 < more < 100 << 20

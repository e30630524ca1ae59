"""Memory that is freed goes back to the system, where the C library can be told."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
import torch
from liar_ext.engine.allocator import steady_allocator
from liar_ext.memory_parts import resident_bytes

told = steady_allocator()
before = resident_bytes()
held, freed = [], []
for _ in range(32):
    # holes of 2 MiB between what is held are what a heap cannot give back
    freed.append(torch.ones(1 << 19))
    held.append(torch.ones(1 << 19))
most = resident_bytes()
freed.clear()
print(int(told), most - before, resident_bytes() - before)
"""


def test_holes_between_what_is_held_are_given_back():
    done = subprocess.run([sys.executable, "-c", CHECK], check=True, capture_output=True, text=True)
    told, most, left = map(int, done.stdout.split())
    if not told:
        pytest.skip("the C library has no mallopt")
    assert most > 120 << 20
    assert left < 72 << 20

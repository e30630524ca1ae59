"""Formulas for repairs, residuals and selections against what a process of its own took."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from liar_ext.ops.interpolate import repair_bytes
from liar_ext.ops.inverse import inverse_bytes
from liar_ext.ops.removal import removal_bytes
from liar_ext.ops.residual import residual_bytes

# torch has no allocator statistics on a CPU: the high-water mark of the resident set, with every
# block of its own given back when it is freed
PROGRAM = """
import gc, json, sys, torch
from liar_ext.ops import Moments, repair
from liar_ext.ops.residual import residual_energies

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(call):
    call()  # libraries take buffers at their first call
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

found = []
for kept, dropped, outputs, dtype in json.loads(sys.argv[1]):
    columns = kept + dropped
    x = torch.randn(500, columns)
    gram = (x.T @ x).add_(torch.eye(columns) * 500).to(getattr(torch, dtype))
    moments = Moments(torch.tensor(500), x.sum(0).double(), gram)
    keep, drop = torch.randperm(columns).split([kept, dropped])
    weight = torch.randn(outputs, columns)
    new = weight[:, keep].double()
    found.append([
        peak(lambda: repair(moments, weight, keep, drop, ridge=1e-2)),
        peak(lambda: residual_energies(moments, weight, keep, new)),
    ])
print(json.dumps(found))
"""

# fold first twice, then more outputs than columns go, and a small system under a wide weight;
# Moments in float64 have no float32 products
SHAPES = [
    (1601, 1501, 1201, "float64"),
    (1801, 401, 333, "float64"),
    (1001, 901, 1801, "float64"),
    (511, 1501, 1201, "float64"),
    (1201, 1001, 901, "float32"),
]


def _measured(program: str, shapes: list) -> list[list[int]]:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs the high-water mark of Linux")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(shapes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def measured() -> list[list[int]]:
    return _measured(PROGRAM, SHAPES)


@pytest.mark.parametrize("case", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_the_memory_of_a_repair_is_what_the_formula_says(case, measured):
    kept, dropped, outputs, _ = SHAPES[case]
    assert measured[case][0] == pytest.approx(repair_bytes(kept, dropped, outputs), rel=0.15)


@pytest.mark.parametrize("case", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_the_memory_of_a_residual_is_what_the_formula_says(case, measured):
    kept, dropped, outputs, dtype = SHAPES[case]
    expected = residual_bytes(kept + dropped, outputs, kept)
    if dtype == "float64":
        assert measured[case][1] == pytest.approx(expected, rel=0.15)
    else:
        assert measured[case][1] <= 1.05 * expected
    assert expected <= residual_bytes(kept + dropped, outputs)


@pytest.mark.parametrize("rows", [1, 512, 4096])
def test_a_slice_of_the_outputs_takes_the_route_and_less_memory(rows):
    whole = repair_bytes(5504, 5504, 4096)
    assert repair_bytes(5504, 5504, 4096, rows) <= whole
    # C_SS, its factor and two right sides
    assert whole == pytest.approx(8 * (2 * 5504**2 + 2 * 5504 * 4096), rel=0.04)


REMOVAL = """
import gc, json, sys, torch
from liar_ext.ops import Moments
from liar_ext.ops.interpolate import inverse_moments
from liar_ext.ops.removal import STEPS, Tableau

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(call):
    call()  # libraries take buffers at their first call
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

found = []
for columns, outputs, width in json.loads(sys.argv[1]):
    x = torch.randn(500, columns)
    moments = Moments(
        torch.tensor(500), x.sum(0).double(), (x.T @ x).add_(torch.eye(columns) * 500)
    )
    weight = torch.randn(outputs, columns)

    def remove():
        tableau = Tableau(inverse_moments(moments, ridge=1e-2).theta, weight, width)
        # ten steps of those that half of the columns take
        step = -(-columns // 2 // STEPS) if width == 1 else 1
        tableau.remove(10 * step, steps=10)

    found.append([peak(lambda: inverse_moments(moments, ridge=1e-2)), peak(remove)])
print(json.dumps(found))
"""

# columns, outputs, columns of a unit; the last has more outputs than columns
REMOVALS = [(2301, 701, 1), (1601, 1201, 1), (1536, 1024, 64), (1001, 1501, 1)]


@pytest.fixture(scope="module")
def removed() -> list[list[int]]:
    return _measured(REMOVAL, REMOVALS)


@pytest.mark.parametrize("case", range(len(REMOVALS)), ids=[str(shape) for shape in REMOVALS])
def test_the_memory_of_a_selection_is_what_the_formula_says(case, removed):
    columns, outputs, _ = REMOVALS[case]
    assert removed[case][0] == pytest.approx(inverse_bytes(columns), rel=0.15)
    expected = removal_bytes(columns, outputs, columns // 2)
    assert removed[case][1] == pytest.approx(expected, rel=0.15)


def test_a_selection_at_70b_widths_holds_one_matrix_and_the_weights():
    """28672 columns and 8192 outputs: 20 GB were three matrices."""
    columns, outputs = 28672, 8192
    found = removal_bytes(columns, outputs, columns // 2)
    assert found == pytest.approx(8 * (columns**2 + outputs * columns), rel=0.04)
    assert found < 9e9

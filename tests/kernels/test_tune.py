"""The autotuner, run on the interpreter: its times mean nothing there, its checks do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from liar_ext.errors import BackendError
from liar_ext.kernels import products, runtime, tune
from liar_ext.kernels.config import ProductConfig, config_for, read_table

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="runs kernels on CPU tensors")

GOOD = products.INTERPRETED
OTHER = ProductConfig(block=32, block_t=32, warps=4, stages=1, flush=2)


def test_the_best_of_each_size_is_written_for_this_device(tmp_path):
    path = tmp_path / "table.json"
    rows = tune.tune([20, 40], 70, ["bfloat16", torch.float32], path, repeats=1)
    assert len(rows) == 2 * 2 * 2
    assert all(row["ok"] and row["ms"] > 0 and row["best"] for row in rows)
    assert max(row["error"] for row in rows) < 1e-6
    table = read_table(path)
    assert table.device == "interpreter"
    assert {entry.max_columns for entry in table.entries} == {20, None}
    timed = table.entries[0].timed
    assert {"date", "torch", "triton", "columns", "tokens", "ms", "error"} < timed.keys()
    assert config_for("pointer", "bfloat16", 9999, 90, "interpreter", [table]) == GOOD


def test_another_run_keeps_the_entries_of_other_dtypes(tmp_path):
    path = tmp_path / "table.json"
    tune.tune([20], 40, ["float16"], path, kernels=["pointer"], repeats=1)
    tune.tune([20], 40, ["bfloat16"], path, kernels=["pointer"], only=[OTHER], repeats=1)
    found = {entry.dtype: entry.config for entry in read_table(path).entries}
    assert found == {"float16": GOOD, "bfloat16": OTHER}


def test_a_wrong_candidate_is_reported_and_not_timed(monkeypatch):
    accumulate = tune.accumulate

    def broken(x, mask, order, gram, sum, *, kernel, config):
        accumulate(x, mask, order, gram, sum, kernel=kernel, config=config)
        if config == OTHER:
            gram[3, 1] *= 1.01

    monkeypatch.setattr(tune, "accumulate", broken)
    right, wrong = tune.tune([20], 40, ["bfloat16"], kernels=["pointer"], only=[GOOD, OTHER])
    assert right["ok"] and right["best"]
    assert not wrong["ok"] and not wrong["best"]
    assert wrong["ms"] is None
    assert "not timed" in wrong["reason"]


def test_a_candidate_that_does_not_launch_is_reported(monkeypatch):
    def fail(*_, **__):
        raise BackendError("out of shared memory")

    monkeypatch.setattr(tune, "accumulate", fail)
    (row,) = tune.tune([20], 40, ["bfloat16"], kernels=["pointer"])
    assert (row["ok"], row["ms"], row["best"]) == (False, None, False)
    assert row["reason"] == "out of shared memory"


@pytest.mark.parametrize(
    ("sizes", "dtypes", "kernels"),
    [([], ["bfloat16"], ["pointer"]), ([8], ["int8"], ["pointer"]), ([8], ["bfloat16"], ["fast"])],
)
def test_requests_that_make_no_sense_are_refused(sizes, dtypes, kernels):
    with pytest.raises(ValueError, match="give at least one of each"):
        tune.tune(sizes, 8, dtypes, kernels=kernels)


def test_without_a_gpu_or_the_interpreter_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    with pytest.raises(BackendError, match="needs a CUDA device"):
        tune.tune([8], 8)


def test_the_table_of_a_device_is_named_after_it(monkeypatch):
    monkeypatch.setattr(runtime, "device_name", lambda device: "NVIDIA H200 (x)")
    assert tune.device_file("cuda:0").name == "nvidia_h200_x.json"

"""Where memory runs out decides which flag the error names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from liar_ext.checkpoint.reader import CheckpointReader
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.cli import main
from liar_ext.engine import compress as engine
from liar_ext.engine import repair
from liar_ext.engine.capture import LayerRun
from liar_ext.engine.clock import Clock
from liar_ext.engine.shelf import DeviceShelf
from liar_ext.engine.statistics import SiteMoments
from liar_ext.errors import OutOfMemory

CPU_SAYS = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
)
WIDTHS = "that depends on the model's widths, not on --batch-size; give --hidden-states disk"


def failed(inputs: Any, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The last line of `liar prune`, which ends with 1."""
    arguments = ["prune", str(inputs.llama), "--out", str(folder / "out"), *options]
    arguments += ["--calibration", str(inputs.text), "--samples", "8", "--seq-len", "32"]
    assert main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("owner", "name", "raised", "says"),
    [
        (
            LayerRun,
            "to_next",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
            "out of memory in the forward pass: a whole batch is in memory at once; lower "
            "--batch-size or --seq-len, or give --hidden-states disk",
        ),
        (
            DeviceShelf,
            "put",
            MemoryError(),
            "out of memory where hidden states wait; give --hidden-states disk",
        ),
        (SiteMoments, "add", CPU_SAYS, f"out of memory in the statistics of a layer: {WIDTHS}"),
        (
            SiteMoments,
            "__init__",
            CPU_SAYS,
            f"out of memory in the statistics of a layer: {WIDTHS}",
        ),
        (
            repair,
            "residual_energies",
            CPU_SAYS,
            f"out of memory in the repair of a layer: {WIDTHS}",
        ),
        (CheckpointReader, "get", MemoryError(), f"out of memory reading a layer: {WIDTHS}"),
        (CheckpointStore, "_as_stored", CPU_SAYS, f"out of memory writing a layer: {WIDTHS}"),
        (
            engine,
            "load_calibration",
            MemoryError(),
            "out of memory; lower --batch-size, --samples or --seq-len",
        ),
    ],
    ids=[
        *("forward", "hold", "gram", "gram-made", "solve", "load", "write", "calibration"),
    ],
)
def test_the_error_names_what_to_lower(
    inputs, tmp_path, monkeypatch, capsys, owner, name, raised, says
):
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(owner, name, fail)
    assert failed(inputs, tmp_path, capsys, "--hidden-states", "device") == says
    assert list(tmp_path.iterdir()) == []


def test_after_a_journal_entry_that_is_kept(inputs, tmp_path, monkeypatch, capsys):
    real = CheckpointStore.open

    def fail(self: CheckpointStore, index: int) -> None:
        if index == 1:
            raise MemoryError
        real(self, index)

    monkeypatch.setattr(CheckpointStore, "open", fail)
    error = failed(inputs, tmp_path, capsys, "--journal-seconds", "0")
    assert error.endswith("; 1 of 2 layers pruned are kept, --resume goes on from there")
    assert [path.name for path in tmp_path.iterdir()] == [".out.job"]


@pytest.mark.parametrize(
    ("phase", "place", "says"),
    [
        ("forward", "device", "--seq-len, or give --hidden-states host or disk"),
        ("forward", "host", "--seq-len, or give --hidden-states disk"),
        ("forward", "disk", "lower --batch-size or --seq-len"),
        ("hold", "host", "give --hidden-states disk"),
        ("hold", "disk", "lower --batch-size or --seq-len"),
        ("gram", "device", "give --hidden-states host or disk, or --device cpu"),
        ("solve", "disk", "not on --batch-size; give --device cpu"),
    ],
)
def test_on_a_gpu_there_are_more_ways_out(monkeypatch, phase, place, says):
    monkeypatch.setattr(Clock, "_event", lambda self: None)
    clock = Clock(torch.device("cuda"))
    clock.hidden_states = place
    with pytest.raises(OutOfMemory) as caught, clock.phase(phase):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value).endswith(says)


def test_other_errors_of_a_phase_are_passed_on():
    with (
        pytest.raises(RuntimeError, match="sizes differ"),
        Clock(torch.device("cpu")).phase("gram"),
    ):
        raise RuntimeError("sizes differ")

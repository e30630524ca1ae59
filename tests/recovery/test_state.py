"""States of a training on disk: whole or not there, and never another training's."""

from __future__ import annotations

import pytest
import torch

from liar_ext import InputError
from liar_ext.recovery import TrainingState

IDENTITY = {"source": {"a": 1}, "seed": 0}


@pytest.fixture
def state(tmp_path):
    return TrainingState(tmp_path / "state", IDENTITY)


def test_the_last_state_counts_and_the_others_are_forgotten(state):
    assert state.load() is None
    assert state.steps() == 0
    assert not state.folder.exists()
    for step in (9, 10, 100):
        state.save(step, {"a": torch.full((2,), step), "n": torch.tensor(3.0)}, {"tokens": step})
    assert [path.name for path in state.folder.iterdir()] == ["step-000000100"]
    step, tensors, numbers = state.load()
    assert (step, numbers["tokens"]) == (100, 100)
    assert torch.equal(tensors["a"], torch.full((2,), 100))
    state.save(100, {"a": torch.zeros(1)}, {"tokens": 0})
    assert state.load()[2]["tokens"] == 0
    state.remove()
    assert state.load() is None


def test_a_state_that_was_not_finished_does_not_count(state):
    state.save(2, {"a": torch.zeros(1)}, {})
    half = state.folder / ".step-000000004"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert state.steps() == 2
    state.save(4, {"a": torch.ones(1)}, {})
    assert state.load()[0] == 4


def test_another_training_is_refused(state, tmp_path):
    state.save(2, {"a": torch.zeros(1)}, {})
    other = TrainingState(state.folder, {"source": {"a": 2}, "seed": 0})
    with pytest.raises(
        InputError, match=r"--resume: source.a is 2, and 1 in .*state.json; restore"
    ):
        other.load()


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_damage_is_named(state, file):
    state.save(2, {"a": torch.zeros(1)}, {})
    (state.folder / "step-000000002" / file).write_bytes(b"{")
    with pytest.raises(InputError, match="cannot be read .* start again with --overwrite"):
        state.load()

"""Moments on disk in whole compressions: the choice never shows, and a resume keeps it."""

from __future__ import annotations

import collections
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from liar_families import FAMILIES, tree_hash, write_tokens

import liar_ext
from liar_ext import Execution, InputError, Recipe
from liar_ext.engine.keeper import Keeper

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def dense(tmp_path) -> Path:
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def recipe(tmp_path: Path, **changes) -> Recipe:
    values = {"samples": 40, "seq_len": 24, "batch_size": 5, "statistics": "oneshot"}
    values |= {"calibration": str(write_tokens(tmp_path / "t.npy")), "sparsity": 0.5}
    return Recipe(**{**values, "target": ("ffn", "heads"), "allocation": "global", **changes})


def weights(out: Path) -> dict[str, str]:
    return {str(p): d for p, d in tree_hash(out).items() if "report" not in str(p)}


def no_room(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 10))


def stopped_after(entries: int, monkeypatch):
    """Compressions stop, as by Ctrl-C, after that many journal entries."""
    real, count = Keeper.keep, [0]

    def keep(self, *arguments):
        real(self, *arguments)
        count[0] += 1
        if count[0] == entries:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "keep", keep)


@pytest.mark.parametrize("criterion", ["wanda", "flap"])
def test_room_for_moments_changes_the_passes_and_not_the_result(
    criterion, dense, tmp_path, monkeypatch
):
    settings = recipe(tmp_path, criterion=criterion)
    one = liar_ext.compress(dense, tmp_path / "one", settings)
    no_room(monkeypatch)
    two = liar_ext.compress(dense, tmp_path / "two", settings)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert [s.relative_residual for s in one.sites] == [s.relative_residual for s in two.sites]


@pytest.mark.parametrize("entries", [1, 3], ids=["while scoring", "while pruning"])
@pytest.mark.parametrize("room", [True, False], ids=["with moments", "two passes"])
def test_a_resume_goes_on_as_it_was_begun_whatever_the_disk_has_now(
    room, entries, dense, tmp_path, monkeypatch
):
    settings, execution = recipe(tmp_path), Execution(journal_seconds=0)
    liar_ext.compress(dense, tmp_path / "expected", settings)
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        stopped_after(entries, patch)
        if not room:
            no_room(patch)
        with pytest.raises(KeyboardInterrupt):
            liar_ext.compress(dense, tmp_path / "out", settings, execution=execution)
    if room:
        no_room(monkeypatch)
    else:
        monkeypatch.setattr(shutil, "disk_usage", usage)
    resumed = replace(execution, resume=True)
    liar_ext.compress(dense, tmp_path / "out", settings, execution=resumed)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_statistics_that_came_from_a_folder_have_to_be_given_again(dense, tmp_path, monkeypatch):
    settings = recipe(tmp_path, allocation="uniform")
    execution = Execution(journal_seconds=0, moments=tmp_path / "moments")
    liar_ext.compress(dense, tmp_path / "expected", settings, execution=execution)
    with monkeypatch.context() as patch:
        stopped_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            liar_ext.compress(dense, tmp_path / "out", settings, execution=execution)
    resumed = replace(execution, resume=True)
    with pytest.raises(InputError, match="--moments folder; give that folder again"):
        liar_ext.compress(
            dense, tmp_path / "out", settings, execution=replace(resumed, moments=None)
        )
    liar_ext.compress(dense, tmp_path / "out", settings, execution=resumed)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_the_name_of_the_calibration_file_does_not_matter(dense, tmp_path):
    """Two spellings of one file are the same tokens."""
    execution = Execution(moments=tmp_path / "moments")
    first = liar_ext.compress(
        dense, tmp_path / "one", recipe(tmp_path, allocation="uniform"), execution=execution
    )
    other = f"{tmp_path}/dense/../t.npy"
    second = liar_ext.compress(
        dense,
        tmp_path / "two",
        replace(recipe(tmp_path, allocation="uniform"), calibration=other),
        execution=execution,
    )
    assert first.seconds["forward"] > 0
    assert second.seconds["forward"] == 0


def test_nothing_is_entered_for_statistics_that_are_not_needed_any_more(
    dense, tmp_path, monkeypatch
):
    """Interrupted past the last targeted layer, with Sites that others ask for still missing."""
    from liar_ext.engine.moments_store import MomentsStore

    settings = recipe(tmp_path, allocation="uniform", layers=(0, 1), target=("ffn",))
    liar_ext.compress(dense, tmp_path / "expected", settings)
    execution = Execution(journal_seconds=0)
    with monkeypatch.context() as patch:
        stopped_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            liar_ext.compress(dense, tmp_path / "out", settings, execution=execution)
    MomentsStore.ask(tmp_path / "moments", [(("heads",), None)])
    resumed = replace(execution, resume=True, moments=tmp_path / "moments")
    liar_ext.compress(dense, tmp_path / "out", settings, execution=resumed)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")

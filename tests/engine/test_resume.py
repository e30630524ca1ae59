"""A compression that is killed at any moment and resumed makes what one without a break makes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from liar_families import tree_hash
from liar_kill import Bench, Work, compress, contents, differences, resume

import liar_ext
from liar_ext import InputError
from liar_ext.checkpoint.job import open_job
from liar_ext.engine.execution import Execution


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize(
    ("recipe", "hidden_states", "kills"),
    [
        (
            {"criterion": "random"},
            "device",
            [
                ("layer being written", 1),
                ("journal written", 1),
                ("site half pruned", 2),
                ("hidden states not named", 2),
                ("old hidden states still there", 1),
                ("not renamed", 1),
            ],
        ),
        (
            {"allocation": "global"},
            "disk",
            [
                ("hidden states half written", 5),
                ("journal written", 2),
                ("journal half written", 2),
                ("shards made", 1),
                ("tensor half written", 9),
                ("journal written", 2),
                ("records written", 1),
            ],
        ),
        (
            {"statistics": "oneshot", "bias": "always"},
            "disk",
            [
                ("tensor half written", 20),
                ("old hidden states still there", 2),
                ("hidden states half written", 4),
                ("shards complete", 1),
                ("renamed", 1),
            ],
        ),
        (
            {"statistics": "oneshot", "allocation": "global", "criterion": "flap"},
            "device",
            [
                ("moments being saved", 1),
                ("moments being saved", 4),
                ("journal written", 2),
                ("hidden states not named", 2),
                ("site half pruned", 3),
                ("other files copied", 1),
            ],
        ),
        (
            {"depth": "shortgpt", "drop": 1, "sparsity": 0.3, "target_signal": "stream"},
            "disk",
            [
                ("layers chosen", 1),
                ("journal written", 1),
                ("site half pruned", 1),
                ("hidden states half written", 3),
                ("records written", 1),
            ],
        ),
        (
            {"allocation": "alpha", "layers": (1, 4)},
            "device",
            [("journal written", 1), ("layer computed", 2), ("tensor half written", 5)],
        ),
        (
            {"allocation": "influence", "statistics": "oneshot"},
            "disk",
            [("journal written", 2), ("moments being saved", 3), ("site half pruned", 2)],
        ),
        (
            {"allocation": "besa", "layers": (1, 3)},
            "disk",
            [("journal written", 2), ("layer computed", 2), ("site half pruned", 1)],
        ),
        (
            {"allocation": "levels", "criterion": "obs", "budget": "flops"},
            "device",
            [("journal written", 2), ("hidden states not named", 1), ("journal written", 2)],
        ),
        (
            {"allocation": "spdy", "search_samples": 4, "search_evaluations": 12},
            "disk",
            [
                ("journal written", 2),
                ("levels not named", 2),
                ("levels being saved", 2),
                ("candidates compared", 1),
                ("answers written", 2),
                ("search over", 1),
                ("levels still there", 1),
                ("layer being written", 2),
            ],
        ),
        (
            {
                "allocation": "evolution",
                "criterion": "random",
                "search_samples": 4,
                "search_evaluations": 8,
            },
            "device",
            [
                ("levels being saved", 3),
                ("answers written", 1),
                ("levels gone", 1),
                ("journal written", 2),
            ],
        ),
        (
            {"ridge": "auto"},
            "device",
            [("journal written", 1), ("site half pruned", 2), ("layer being written", 1)],
        ),
        (
            {"layers": (1, 3), "reconstruct": "none"},
            "device",
            [("layer computed", 2), ("journal written", 2), ("layer being written", 1)],
        ),
        (
            {"target_signal": "dense", "layers": (1, 4)},
            "disk",
            [
                ("journal written", 1),
                ("site half pruned", 1),
                ("hidden states half written", 3),
                ("journal written", 2),
                ("old hidden states still there", 1),
            ],
        ),
        (
            {"target_signal": "stream"},
            "disk",
            [("site half pruned", 3), ("hidden states half written", 3), ("journal written", 2)],
        ),
    ],
    ids=[
        "sequential",
        "global",
        "oneshot",
        "oneshot-global",
        "layers",
        "alpha",
        "influence",
        "besa",
        "levels",
        "search-with-survey",
        "search",
        "ridge-auto",
        "some-layers",
        "dense-target",
        "stream-target",
    ],
)
def test_killed_again_and_again_the_result_is_the_same(
    bench, tmp_path, recipe, hidden_states, kills
):
    execution = Execution(hidden_states=hidden_states, journal_seconds=0)
    recipe = bench.recipe(**recipe)
    work = Work(bench.source, tmp_path / "out", recipe, execution)
    assert compress(replace(work, out=tmp_path / "whole")).done
    for point, nth in kills:
        assert compress(work, at=point, nth=nth).killed, f"{point} was not reached {nth} times"
        assert work.out.exists() == (point == "renamed"), "complete under its name, or not at all"
        work = work.resumed()
    resume(work)
    assert differences(tmp_path / "whole", work.out) == []


def test_what_a_search_found_is_known_after_it(bench, tmp_path):
    changes = {"allocation": "evolution", "search_samples": 4, "search_evaluations": 8}
    work = Work(bench.source, tmp_path / "out", bench.recipe(**changes))
    assert compress(replace(work, out=tmp_path / "whole")).done
    assert compress(work, at="journal written", nth=3).journal == "2 of 4 layers pruned"
    left = {path.name for path in work.job.folder.iterdir()}
    assert "search.safetensors" in left and "levels" not in left
    resume(work)
    facts = [
        json.loads((folder / "liar_report.json").read_text())["run"]["search"]
        for folder in (tmp_path / "whole", work.out)
    ]
    assert facts[0] == facts[1] and facts[0]["tried"] == 8
    assert differences(tmp_path / "whole", work.out) == []


def test_killed_at_any_moment_the_result_is_the_same(bench, tmp_path):
    recipe = bench.recipe(allocation="global", statistics="sequential")
    work = Work(bench.source, tmp_path / "out", recipe)
    whole = compress(replace(work, out=tmp_path / "whole"))
    moments = np.random.default_rng(5).uniform(0, 1, 6)
    for share in moments:
        compress(work, after=float(share * whole.seconds))
        work = work.resumed()
    resume(work)
    assert differences(tmp_path / "whole", work.out) == []


def test_several_threads_are_no_different(bench, tmp_path):
    work = Work(bench.source, tmp_path / "out", bench.recipe(reconstruct="none"), threads=2)
    assert compress(replace(work, out=tmp_path / "whole")).done
    assert compress(work, at="journal written", nth=2).killed
    resume(work)
    assert differences(tmp_path / "whole", work.out) == []


def test_the_report_says_where_it_was_resumed(bench, tmp_path):
    work = Work(bench.source, tmp_path / "out", bench.recipe())
    assert compress(work, at="journal written", nth=3).journal == "3 of 4 layers pruned"
    resume(work)
    assert json.loads((work.out / "liar_report.json").read_text())["run"]["resumed_at"] == 3


@pytest.mark.parametrize("place", ["device", "disk"])
def test_hidden_states_may_wait_elsewhere_after_a_break(bench, tmp_path, place):
    other = {"device": "disk", "disk": "device"}[place]
    work = Work(bench.source, tmp_path / "out", bench.recipe(), Execution(place, journal_seconds=0))
    assert compress(work, at="journal written", nth=2).killed
    (tmp_path / "elsewhere").mkdir()
    moved = replace(work.execution, hidden_states=other, scratch=tmp_path / "elsewhere")
    resume(replace(work, execution=moved))
    assert differences(bench.whole(work.recipe), work.out) == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_without_a_journal_entry_it_starts_again_and_nothing_is_left(bench, tmp_path):
    execution = Execution(hidden_states="disk", journal_seconds=3600, scratch=tmp_path)
    work = Work(bench.source, tmp_path / "out", bench.recipe(), execution)
    assert compress(work, at="layer being written", nth=3).journal is None
    assert compress(work).done
    assert differences(bench.whole(work.recipe), work.out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_without_anything_to_resume_starts_at_the_beginning(bench, tmp_path):
    work = Work(bench.source, tmp_path / "out", bench.recipe())
    resume(work)
    assert differences(bench.whole(work.recipe), work.out) == []


def test_resume_of_what_is_complete_says_so_and_touches_nothing(bench, tmp_path):
    out, recipe = tmp_path / "out", bench.recipe()
    assert compress(Work(bench.source, out, recipe), at="renamed").killed
    before = tree_hash(out)
    report = liar_ext.compress(bench.source, out, recipe, execution=Execution(resume=True))
    assert report == liar_ext.Report.read(out)
    assert tree_hash(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="out: exists; give another folder or --overwrite"):
        liar_ext.compress(bench.source, out, bench.recipe(seed=1), execution=Execution(resume=True))
    assert tree_hash(out) == before


def test_an_output_that_is_replaced_is_there_until_the_new_one_is(bench, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bench.whole(bench.recipe(seed=1)), out)
    old = contents(out)
    work = Work(bench.source, out, bench.recipe(), overwrite=True)
    for point in ("journal written", "records written"):
        assert compress(work, at=point).killed
        assert contents(out) == old
        with pytest.raises(InputError, match="exists, and an unfinished .* --resume --overwrite"):
            liar_ext.compress(bench.source, out, bench.recipe(), execution=Execution(resume=True))
        work = work.resumed()
    # between the two renames neither has the name; both are safe
    assert compress(work, at="old output moved").killed
    assert not out.exists()
    resume(work)
    assert differences(bench.whole(work.recipe), out) == []


def test_an_output_that_was_moved_aside_comes_back_when_the_new_one_is_given_up(bench, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(bench.whole(bench.recipe(seed=1)), out)
    old = contents(out)
    execution = Execution(journal_seconds=3600)
    work = Work(bench.source, out, bench.recipe(), execution, overwrite=True)
    assert compress(work, at="old output moved").killed
    assert not out.exists()
    with pytest.raises(InputError, match="out: exists"):
        liar_ext.compress(bench.source, out, bench.recipe())
    assert contents(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_second_process_is_refused_and_the_first_is_not_disturbed(bench, tmp_path):
    work = Work(bench.source, tmp_path / "out", bench.recipe())
    with open_job(work.out, None) as job:
        (job.scratch / "mine").write_text("x")
        for other in (work, work.resumed(), replace(work, overwrite=True)):
            kind, message = compress(other).error or ("", "")
            assert kind == "InputError"
            assert message == (
                f"--out {work.out}: another process is writing it (it holds {job.folder}/lock)"
            )
        assert (job.scratch / "mine").read_text() == "x"
        assert job.output.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_one_name_share_a_scratch_folder(bench, tmp_path):
    (tmp_path / "scratch").mkdir()
    execution = Execution("disk", scratch=tmp_path / "scratch", journal_seconds=0)
    one, two = (
        Work(bench.source, tmp_path / name / "out", bench.recipe(), execution)
        for name in ("one", "two")
    )
    assert compress(one, at="journal written", nth=2).killed
    left = tree_hash(tmp_path / "scratch")
    assert compress(two).done
    assert tree_hash(tmp_path / "scratch") == left, "the other output's files are its own"
    resume(one)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert differences(one.out, two.out) == []

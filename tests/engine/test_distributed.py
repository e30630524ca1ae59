"""`torchrun ... -m liar_ext prune`: any number of ranks gives the result of one process, and when
one rank fails, all end with one line each and nothing is lost that the journal has.

Five launches serve all tests; what they run is in tests/support/liar_torchrun.py. The results of
one process are the reference.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import liar_torchrun
import pytest
import torch
from liar_families import FAMILIES, randomise, write_tokens
from liar_torchrun import Command, Told, launch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from liar_ext.checkpoint.job import job_folder

# largest difference over largest weight; the sums are the same bits on any number of ranks, and so
# far every weight was: this leaves room for a linear algebra that solves for fewer rows differently
TOLERANCE = 1e-6
# seconds until all ranks have ended after one did: they poll every 0.25 s, and give each other 5 s
PROMPT = 20.0
SIZES = (2, 4)
# each one's source and options; tokens enough for five segments (of `liar_torchrun.SEGMENT`), so
# that four ranks have some
VARIANTS = {
    "sequential": ("llama", "--target ffn,heads"),
    "oneshot": ("llama", "--statistics oneshot --criterion flap"),
    "global": ("llama", "--statistics oneshot --allocation global --target ffn,heads"),
    "with bias": ("llama", "--bias always --criterion random"),
    "dense target": ("llama", "--target-signal dense --target ffn,heads"),
    "stream target": ("llama", "--target-signal stream --target ffn,heads"),
    "on disk": ("llama", "--hidden-states disk --target ffn,heads"),
    "encoder": ("bert", "--target ffn,heads"),
    "idle ranks": ("llama", "--samples 10"),
    "alpha": ("llama", "--allocation alpha --target ffn,heads --budget flops"),
    "influence": ("llama", "--allocation influence"),
    "levels": ("llama", "--allocation levels --target ffn,heads"),
    "besa": ("llama", "--allocation besa --target ffn,heads --layers 1:3"),
    "policy": ("llama", "--criterion policy --policy-steps 3 --allocation ranked"),
    "search": (
        "llama",
        "--allocation level-swaps --target ffn,heads --search-samples 25 --search-evaluations 6",
    ),
    "gradients": ("llama", "--target ffn,heads --criterion fisher --gradient-samples 100"),
    "taylor": ("llama", "--criterion taylor-mixed --gradient-samples 100"),
    "ridge auto": ("llama", "--ridge auto --target ffn,heads"),
    "both": ("llama", "--ridge auto --target-signal stream --target ffn,heads"),
    "scores of weights": ("llama", "--allocation global --criterion magnitude --target ffn,heads"),
    "layers": (
        "llama",
        "--depth streamline --drop 1 --target ffn,heads --target-signal stream --bias always",
    ),
    "layers alone": ("llama", "--depth perplexity-greedy --drop 2 --sparsity 0"),
    "layers by gradients": ("llama", "--depth taylor --drop 1 --gradient-samples 100"),
    "all rows": ("llama", "--ridge auto --reconstruct mask-tuning --bias always"),
}
# four ranks run those in which they share work in different ways: a run of one takes a second
ON_FOUR = (
    *("sequential", "oneshot", "stream target", "on disk", "encoder", "idle ranks"),
    *("levels", "besa", "policy", "search", "taylor", "both", "layers"),
)
ON = {1: tuple(VARIANTS), 2: tuple(VARIANTS), 4: ON_FOUR}
JOURNAL = "--journal-seconds 0"


@dataclass(frozen=True)
class Runs:
    """Attributes: `root` with sources and outputs; `told` by size: by rank: of each command."""

    root: Path
    told: dict[int, list[list[Told]]]

    def command(self, name: str, options: str, *, source: str = "llama", **extra: Any) -> Command:
        """A compression into root/name."""
        given = f"--sparsity 0.3 --samples 250 --seq-len 24 --batch-size 8 {options}"
        calibration = ["--calibration", str(self.root / "tokens.npy")]
        paths = [str(self.root / source), "--out", str(self.root / name)]
        return Command(["prune", *paths, *calibration, *given.split()], **extra)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One process, two ranks and four; the last thing that two ranks do is that one is killed."""
    made = Runs(tmp_path_factory.mktemp("distributed"), {})
    config = FAMILIES["llama-mha"].build().config
    config.num_hidden_layers = 4
    model = randomise(LlamaForCausalLM(config))
    # three files, layers 2 and 3 in the last
    model.save_pretrained(made.root / "llama", max_shard_size="60KB")
    FAMILIES["bert"].build().save_pretrained(made.root / "bert")
    write_tokens(made.root / "tokens.npy", samples=250)
    different = {"1": ["--seed", "7"]}
    for size in (1, *SIZES):
        commands = [
            made.command(f"{name}-{size}", VARIANTS[name][1], source=VARIANTS[name][0])
            for name in ON[size]
        ]
        if size == 1:
            commands.append(made.command("whole", ""))  # what those that fail would make
        if size == 2:
            commands += [
                made.command("different", "", more=different),
                made.command("unreadable", JOURNAL, fault="unreadable"),
                made.command("lost", "", fault="unreadable-at-once"),
                made.command("killed", JOURNAL, fault="killed"),
            ]
        made.told[size] = launch(size, made.root / f"launch-{size}", commands)
        for rank in made.told[size]:
            assert len(rank) >= len(ON[size]), (made.root / f"launch-{size}" / "agent").read_text()
            for told in rank[: len(commands) if size == 1 else len(ON[size])]:
                assert told.code == 0, told.error
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "liar_report.json").read_text())


def difference(one: Path, other: Path) -> float:
    """Of any tensor the largest difference over its largest weight."""
    first, second = weights(one), weights(other)
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(1e-30))
        for name in first
    )


# the same result


@pytest.mark.parametrize(("size", "name"), [(n, name) for n in SIZES for name in ON[n]])
def test_any_number_of_ranks_makes_what_one_process_makes(runs: Runs, name: str, size: int) -> None:
    one, several = runs.root / f"{name}-1", runs.root / f"{name}-{size}"
    assert difference(one, several) <= TOLERANCE
    before, after = report(one), report(several)
    assert (before["run"]["ranks"], after["run"]["ranks"]) == (1, size)
    assert after["totals"] == before["totals"]
    for ours, theirs in zip(after["sites"], before["sites"], strict=True):
        for key in ("name", "units_after", "columns_after", "bias_added", "steps"):
            assert ours[key] == theirs[key]
        assert ours["relative_residual"] == pytest.approx(theirs["relative_residual"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_ranks_tries_the_same_models(runs: Runs, size: int) -> None:
    one, several = (
        [
            json.loads(line)
            for line in (runs.root / f"search-{n}" / "liar_search.jsonl").read_text().splitlines()
        ]
        for n in (1, size)
    )
    assert len(one) == len(several) > 6
    for ours, theirs in zip(several, one, strict=True):
        assert (ours["units"], ours["windows"]) == (theirs["units"], theirs["windows"])
        # their levels are weights that may differ as those of outputs
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=10 * TOLERANCE, abs=1e-9)
    assert {line["windows"] for line in one} != {25}, "nothing was tried on a part of the windows"


@pytest.mark.parametrize("size", SIZES)
def test_the_first_rank_speaks_for_all(runs: Runs, size: int) -> None:
    first, *others = runs.told[size]
    for number, name in enumerate(ON[size]):
        # rich wraps lines at the width of a terminal
        assert "written:" in first[number].out and f"{name}-{size}" in first[number].out
        assert all((rank[number].out, rank[number].error) == ("", "") for rank in others)
    assert not list(runs.root.glob(f".*-{size}.job"))


# failures


def assert_one_line(told: Told, code: int, *parts: str) -> None:
    assert told.code == code
    assert len(told.errors) == 1, told.error
    assert told.errors[0].startswith("error: ")
    for part in parts:
        assert part in told.errors[0]


def failure(runs: Runs, name: str) -> list[Told]:
    """What the two ranks were told by a command that failed."""
    number = len(VARIANTS) + ["different", "unreadable", "lost", "killed"].index(name)
    return [rank[number] for rank in runs.told[2] if number < len(rank)]


def test_ranks_with_other_options_are_refused_by_name(runs: Runs) -> None:
    for told in failure(runs, "different"):
        assert_one_line(told, 2, 'recipe is {"seed": 0} on rank 0 and {"seed": 7} on rank 1')
    assert not (runs.root / "different").exists()
    assert not job_folder(runs.root / "different").exists()


def test_a_shard_that_one_rank_cannot_read_ends_all_with_its_name(runs: Runs) -> None:
    first, second = failure(runs, "unreadable")
    reason = "model-00003-of-00003.safetensors: cannot be opened (Input/output error)"
    assert_one_line(second, 2, reason)
    assert_one_line(first, 2, "stopped because rank 1 failed: ", reason, "--resume goes on")
    assert max(first.seconds, second.seconds) < PROMPT
    assert not (runs.root / "unreadable").exists()
    assert (job_folder(runs.root / "unreadable") / "journal.json").exists()


def test_a_failure_before_the_journal_has_an_entry_leaves_nothing(runs: Runs) -> None:
    for told in failure(runs, "lost"):
        assert_one_line(told, 2, "cannot be opened (Input/output error)")
        assert "--resume" not in told.error
    assert not (runs.root / "lost").exists()
    assert not job_folder(runs.root / "lost").exists()


def test_a_killed_rank_ends_the_others_with_one_line(runs: Runs) -> None:
    (first,) = failure(runs, "killed")
    assert_one_line(first, 1, "stopped because rank 1 died without a word", "--resume goes on")
    assert first.seconds < PROMPT
    assert not (runs.root / "killed").exists()
    assert (job_folder(runs.root / "killed") / "journal.json").exists()


def test_nothing_is_printed_past_the_error_lines(runs: Runs) -> None:
    for size in SIZES:
        assert liar_torchrun.beside(runs.root / f"launch-{size}") == ""


# going on, with another number of ranks


def unfinished(runs: Runs, name: str, copy: str) -> None:
    """A copy of an interrupted run, to go on with under another name."""
    shutil.copytree(job_folder(runs.root / name), job_folder(runs.root / copy))


@pytest.mark.parametrize("size", [1, 2])
def test_any_number_of_ranks_goes_on_and_an_interrupt_keeps_the_journal(
    runs: Runs, size: int
) -> None:
    names = {name: f"{name}-resumed-{size}" for name in ("unreadable", "killed")}
    for name, copy in names.items():
        unfinished(runs, name, copy)
    commands = [runs.command(copy, "--resume") for copy in names.values()]
    stopped = runs.command(f"stopped-{size}", JOURNAL, fault="paused")
    folder = runs.root / f"launch-resume-{size}"
    process = liar_torchrun.start(size, folder, [*commands, stopped])
    try:
        wait_for(lambda: all((folder / f"paused-{rank}").exists() for rank in range(size)), process)
        if size == 1:
            process.terminate()
        else:  # as Ctrl-C in a terminal: torchrun passes it on to the ranks
            os.killpg(process.pid, signal.SIGINT)
        process.wait(PROMPT)
    finally:
        process.kill()
    told = liar_torchrun.told(size, folder)
    for number, copy in enumerate(names.values()):
        assert told[0][number].code == 0, told[0][number].error
        assert difference(runs.root / "whole", runs.root / copy) <= TOLERANCE
        assert report(runs.root / copy)["run"]["resumed_at"] >= 1
        assert not job_folder(runs.root / copy).exists()
    assert_one_line(told[0][-1], 2, "interrupted after 2 of 4 layers pruned; --resume goes on")
    for other in told[1:]:
        assert_one_line(other[-1], 2, "interrupted; rank 0 says what is kept")
    assert not (runs.root / f"stopped-{size}").exists()
    assert (job_folder(runs.root / f"stopped-{size}") / "journal.json").exists()
    assert liar_torchrun.beside(folder) == ""


def test_the_command_of_the_manual_goes_on_with_three_ranks(runs: Runs, tmp_path: Path) -> None:
    unfinished(runs, "killed", "killed-resumed-3")
    arguments = runs.command("killed-resumed-3", "--resume").arguments
    line = liar_torchrun.torchrun(3, tmp_path, "-m", "liar_ext", *arguments)
    environment = os.environ | liar_torchrun.ENVIRONMENT
    limit = liar_torchrun.LIMIT_SECONDS
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    out = runs.root / "killed-resumed-3"
    assert difference(runs.root / "whole", out) <= TOLERANCE
    assert report(out)["run"]["ranks"] == 3 and report(out)["run"]["resumed_at"] >= 1


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + liar_torchrun.LIMIT_SECONDS
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_the_tolerance_would_notice_another_selection(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, order in (("one", [0, 1]), ("other", [0, 2])):
        (tmp_path / name).mkdir()
        tensor = torch.arange(12.0).reshape(3, 4)[order].contiguous()
        save_file({"weight": tensor}, tmp_path / name / "model.safetensors")
    assert difference(tmp_path / "one", tmp_path / "other") > TOLERANCE

"""`liar batch`: every line is checked before anything starts; no job takes others with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from liar_ext.cli import main
from liar_ext.engine.moments_store import MomentsStore
from liar_ext.errors import InputError
from liar_ext.job_queue import Queue
from liar_ext.jobs import JobsError, group_keys, ordered, read_jobs

# stands in for `liar prune`: the output's name says what becomes of it
FAKE = """
    import json, os, signal, sys, time
    arguments = sys.argv[1:]
    value = lambda name: arguments[arguments.index(name) + 1] if name in arguments else None
    source, out = arguments[1], value("--out")
    recipe = json.load(open(value("--recipe")))
    moments = value("--moments")
    wanted = None
    if moments:
        wanted = json.load(open(os.path.join(moments, "wanted.json")))["sites"]
        open(os.path.join(moments, "moments.json"), "a").close()
    name = os.path.basename(out)
    call = {"out": name, "arguments": arguments, "wanted": wanted}
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(call) + "\\n")
    print("layer 0 of", name, file=sys.stderr, flush=True)
    if "killed" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "segfault" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "refused" in name:
        print("error: --ridge 7: too steep", file=sys.stderr)
        sys.exit(2)
    if "traceback" in name:
        raise RuntimeError("a bug")
    if "silent" in name:
        sys.exit(0)
    if "orphan" in name:
        if os.fork() == 0:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in name:
        def stop(*_):
            print("error: interrupted; cleaned up", file=sys.stderr)
            sys.exit(2)
        signal.signal(signal.SIGTERM, stop)
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    totals = {"sparsity": recipe["sparsity"], "parameters_before": 100, "parameters_after": 80}
    report = {
        "source": source, "recipe": recipe, "sites": [], "totals": totals, "seconds": {},
        "calibration": {}, "environment": {}, "layout": "stock", "config": {}, "warnings": [],
        "version": 1,
    }
    os.makedirs(out, exist_ok=True)
    json.dump(report, open(os.path.join(out, "liar_report.json"), "w"))
    print("some table")
    print(json.dumps({"out": out, **report}))
"""


class Desk:
    """A folder with a source, a text, and a fake `prune` that notes how it was called."""

    def __init__(self, root: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        shutil.copytree(llama, root / "dense")
        (root / "text.txt").write_text("text")
        self.fake = root / "fake.py"
        self.fake.write_text(textwrap.dedent(FAKE))
        self.command = (sys.executable, "-S", str(self.fake))
        monkeypatch.setenv("CALLS", str(root / "calls"))
        monkeypatch.chdir(root)
        self.heard: list[str] = []

    def write(self, *jobs: object) -> Path:
        file = self.root / "jobs.jsonl"
        lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
        file.write_text("\n".join(lines) + "\n")
        return file

    def job(self, out: str, **rest: object) -> dict[str, object]:
        return {"source": "dense", "out": out, "calibration": "text.txt", **rest}

    def read(self, *jobs: object, **options: bool):
        return read_jobs(self.write(*jobs), {}, **options)

    def queue(self, *jobs: object, overwrite: bool = False, resume: bool = False, **options):
        read = self.read(*jobs, overwrite=overwrite, resume=resume)
        return Queue(
            read,
            moments=self.root / ".jobs.moments",
            resume=resume,
            command=self.command,
            say=self.heard.append,
            **options,
        )

    def calls(self) -> list[dict]:
        file = self.root / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def order(self) -> list[str]:
        return [call["out"] for call in self.calls()]


@pytest.fixture
def desk(tmp_path, inputs, monkeypatch):
    return Desk(tmp_path, inputs.llama, monkeypatch)


def _statuses(outcomes) -> dict[str, str]:
    return {outcome.job.name: outcome.status for outcome in outcomes}


def test_every_bad_line_is_reported_with_its_number_and_nothing_starts(desk, capsys):
    file = desk.write(
        desk.job("a"),
        "",
        "{",
        "[1]",
        desk.job("b", sparsity=2),
        desk.job("c", sparsty=0.5),
        {"source": "dense"},
        desk.job("d", calibration="missing.txt"),
        desk.job("e", overwrite="yes"),
        desk.job("a"),
        desk.job("a/nested"),
        {**desk.job("f"), "source": "./nowhere"},
        {**desk.job("g"), "source": "h"},
        desk.job("h"),
        desk.job("dense/inside"),
    )
    assert main(["batch", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()
    told = {
        3: "not JSON",
        4: "must be a JSON object, not list",
        5: "--sparsity 2",
        6: "unknown key sparsty; known: allocation",
        7: "out missing",
        8: "missing.txt",
        9: 'overwrite "yes": must be a bool',
        10: "out a: is or overlaps the out of line 1",
        11: "overlaps the out of line 1",
        12: "source ./nowhere: no such folder",
        13: "source h: is made by line 14; put that one first",
        15: "overlaps the source",
    }
    assert len(error) == len(told) + 1, error
    for line, (number, message) in zip(error, told.items(), strict=False):
        assert line.startswith(f"{file}:{number}: ") and message in line
    assert error[-1].startswith("error: ") and error[-1].endswith(
        f"(and {len(told) - 1} more lines); nothing was started"
    )
    assert sorted(p.name for p in desk.root.iterdir()) == [
        "dense",
        "fake.py",
        "jobs.jsonl",
        "text.txt",
    ]


def test_every_checkpoint_is_looked_at_before_anything_starts(desk, inputs, capsys, monkeypatch):
    def broken(name, change):
        shutil.copytree(desk.root / "dense", desk.root / name)
        change(desk.root / name)
        return {**desk.job(f"of-{name}"), "source": name}

    def other(folder, **values):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    def short(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    jobs = [
        desk.job("good"),
        broken("no-config", lambda folder: (folder / "config.json").unlink()),
        broken("bad-config", lambda folder: (folder / "config.json").write_text("{")),
        broken("family", lambda folder: other(folder, model_type="mamba")),
        broken("no-weights", lambda folder: (folder / "model.safetensors").unlink()),
        broken("short", short),
        broken("wide", lambda folder: other(folder, intermediate_size=50)),
        desk.job("layers", layers=[0, 9]),
        {**desk.job("bert", target_signal="stream"), "source": str(inputs.bert)},
        {**desk.job("bert-too", criterion="snip"), "source": str(inputs.bert)},
        {**desk.job("of-good"), "source": "good"},
        desk.job("also-good", overwrite=True),
    ]
    assert main(["batch", str(desk.write(*jobs))]) == 2
    error = capsys.readouterr().err.splitlines()
    told = {
        2: "config.json: missing",
        3: "config.json: cannot be read as JSON",
        4: "mamba",
        5: "no-weights",
        6: "short",
        7: "50",
        8: "--layers 0:9: the model has 2 layers",
        9: "--target-signal stream: this bert model",
        10: "--criterion snip",
    }
    assert len(error) == len(told) + 1, error
    for line, (number, message) in zip(error, told.items(), strict=False):
        assert line.startswith(f"{desk.root / 'jobs.jsonl'}:{number}: ")
        assert message in line
    assert error[-1].endswith("(and 8 more lines); nothing was started")
    assert not any((desk.root / name).exists() for name in ("good", "also-good"))


def test_a_checkpoint_that_nobody_will_read_is_not_looked_at(desk, monkeypatch, capsys):
    """What another job makes is not there yet, and what is done has been read."""
    jobs = [desk.job("good"), {**desk.job("of-good"), "source": "good"}]
    desk.write(*jobs)
    assert _through_the_command_line(desk, monkeypatch) == 0
    (desk.root / "dense" / "config.json").unlink()
    assert _through_the_command_line(desk, monkeypatch, "--resume") == 0
    desk.write(*jobs, desk.job("more"))
    capsys.readouterr()
    assert _through_the_command_line(desk, monkeypatch, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: jobs.jsonl:3: ")
    assert "config.json: missing" in line


def test_a_hub_source_is_known_by_its_config(desk, inputs, monkeypatch, capsys):
    asked = []

    def fetched(name, file):
        asked.append((name, file))
        return str(inputs.bert / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    hub = [{**desk.job(f"b{n}", criterion="snip"), "source": "some/bert"} for n in range(2)]
    assert main(["batch", str(desk.write(desk.job("a"), *hub))]) == 2
    assert asked == [("some/bert", "config.json")]
    assert "jobs.jsonl:2: --criterion snip" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "\n\n"], ids=["no file", "no jobs"])
def test_a_file_without_jobs_is_refused(desk, text):
    file = desk.root / "jobs.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match="jobs.jsonl"):
        read_jobs(file, {})


def test_options_are_defaults_and_lines_win(desk):
    file = desk.write(
        {"source": "dense", "out": "a"},
        {"source": "dense", "out": "b", "sparsity": 0.7, "name": "seven"},
    )
    jobs = read_jobs(file, {"sparsity": 0.4, "calibration": "text.txt"}, overwrite=True)
    assert [job.recipe.sparsity for job in jobs] == [0.4, 0.7]
    assert [job.name for job in jobs] == ["a", "seven"]
    assert [job.overwrite for job in jobs] == [True, True]


def test_an_output_that_exists_needs_overwrite(desk):
    desk.queue(desk.job("a")).run()
    with pytest.raises(JobsError, match="jobs.jsonl:1: --out .*exists"):
        desk.read(desk.job("a"))
    assert desk.queue(desk.job("a", overwrite=True)).run()[0].status == "done"
    assert "--overwrite" in desk.calls()[-1]["arguments"]


def test_jobs_run_in_file_order_and_groups_together(desk):
    one = {"statistics": "oneshot"}
    jobs = [
        desk.job("a", **one),
        desk.job("b"),
        desk.job("c", **one, samples=64),
        desk.job("d", **one, sparsity=0.5, criterion="flap"),
        desk.job("e", **one, samples=64),
        desk.job("f", **one, target=["ffn", "heads"]),
    ]
    # the widest of a group is first: it computes what the others need
    assert [job.name for job in ordered(desk.read(*jobs))] == ["f", "a", "d", "b", "c", "e"]


def test_spellings_of_the_same_source_and_text_are_one_group(desk):
    read = desk.read(
        desk.job("a", statistics="oneshot"),
        {
            **desk.job("b", statistics="oneshot", ridge=1e-2),
            "source": str(desk.root / "dense"),
            "calibration": "./text.txt",
        },
        desk.job("c", statistics="oneshot", seed=1),
        desk.job("d"),
    )
    keys = group_keys(read)
    assert keys[1] == keys[2] is not None
    assert keys[3] not in (keys[1], None)
    assert keys[4] is None


def test_a_job_that_reads_anothers_output_stays_after_it(desk):
    one = {"statistics": "oneshot"}
    read = desk.read(
        desk.job("a", **one),
        desk.job("x/made"),
        {**desk.job("b", **one), "source": "x/made"},
        desk.job("c", **one),
        {**desk.job("d", **one, target=["ffn", "heads"]), "source": "x/made"},
    )
    names = [job.name for job in ordered(read)]
    assert names == ["a", "c", "made", "d", "b"]


def test_a_source_that_is_written_anew_in_between_is_another_group(desk):
    one = {"statistics": "oneshot"}
    (desk.root / "dense" / "liar_report.json").write_text("{}")
    (desk.root / "other").mkdir()
    read = desk.read(
        desk.job("a", **one),
        {**desk.job("dense", overwrite=True), "source": "other"},
        desk.job("c", **one),
    )
    keys = group_keys(read)
    assert keys[1] != keys[3]
    assert [job.name for job in ordered(read)] == ["a", "dense", "c"]


def test_a_group_shares_moments_and_leaves_none(desk):
    one = {"statistics": "oneshot"}
    outcomes = desk.queue(
        desk.job("a", **one),
        desk.job("b", **one, target=["heads"], layers=[1, 3]),
        desk.job("alone", **one, seed=3),
        desk.job("sequential"),
    ).run()
    assert set(_statuses(outcomes).values()) == {"done"}
    given = {c["out"]: "--moments" in c["arguments"] for c in desk.calls()}
    assert given == {"a": True, "b": True, "alone": False, "sequential": False}
    assert desk.calls()[0]["wanted"] == [
        {"target": ["ffn"], "layers": None},
        {"target": ["heads"], "layers": [1, 3]},
    ]
    assert not (desk.root / ".jobs.moments").exists()


def test_moments_are_kept_on_demand(desk):
    desk.queue(desk.job("a", statistics="oneshot"), keep_moments=True).run()
    (folder,) = (desk.root / ".jobs.moments").iterdir()
    assert (folder / "moments.json").exists()


def test_a_failing_job_is_reported_and_the_others_run(desk):
    outcomes = desk.queue(
        desk.job("refused"),
        desk.job("traceback"),
        desk.job("silent"),
        desk.job("killed"),
        desk.job("segfault"),
        desk.job("good", sparsity=0.4),
    ).run()
    found = {outcome.job.name: outcome for outcome in outcomes}
    assert [o.status for o in outcomes] == ["failed"] * 5 + ["done"]
    assert found["refused"].error == "--ridge 7: too steep"
    assert found["traceback"].error == "exit status 1: RuntimeError: a bug"
    assert "no report" in found["silent"].error
    assert found["killed"].error == "killed by signal 9 (Killed); out of memory?"
    assert found["segfault"].error.startswith("killed by signal 11 (Segmentation fault")
    assert found["good"].totals["sparsity"] == 0.4
    assert "[refused] error: --ridge 7: too steep" in desk.heard
    assert "[good] layer 0 of good" in desk.heard
    # how far it is; how long the rest takes while there is any
    assert f"{len(found)} of {len(found)} jobs" in desk.heard
    assert any(re.fullmatch(rf"1 of {len(found)} jobs, about .* left", line) for line in desk.heard)


def test_workers_that_outlive_a_crash_are_ended(desk, monkeypatch):
    monkeypatch.setattr("liar_ext.job_queue.GRACE_SECONDS", 0.2)
    started = time.monotonic()
    outcomes = desk.queue(desk.job("orphan"), desk.job("good")).run()
    assert _statuses(outcomes) == {"orphan": "failed", "good": "done"}
    assert time.monotonic() - started < 20


def test_stop_on_error_starts_nothing_more(desk):
    outcomes = desk.queue(desk.job("a"), desk.job("refused"), desk.job("c"), stop_on_error=True)
    assert [o.status for o in outcomes.run()] == ["done", "failed", "not run"]
    assert desk.order() == ["a", "refused"]


def test_a_job_whose_source_was_not_made_is_not_started(desk):
    outcomes = desk.queue(
        desk.job("x/refused"), {**desk.job("b"), "source": "x/refused"}, desk.job("c")
    ).run()
    assert [o.status for o in outcomes] == ["failed", "failed", "done"]
    assert "output of refused, which is not done" in outcomes[1].error
    assert desk.order() == ["refused", "c"]


def test_resume_skips_what_is_done_and_goes_on_with_the_rest(desk):
    first = [desk.job("a"), desk.job("refused")]
    desk.queue(*first).run()
    (desk.root / ".b.job").mkdir()
    (desk.root / ".b.job" / "journal.json").write_text("{}")
    with pytest.raises(JobsError, match="jobs.jsonl:2: out b: an unfinished run is there"):
        desk.read(desk.job("c"), desk.job("b"))
    outcomes = desk.queue(desk.job("a"), desk.job("b", overwrite=True), desk.job("c"), resume=True)
    outcomes = outcomes.run()
    assert [o.status for o in outcomes] == ["skipped", "done", "done"]
    assert outcomes[0].totals["parameters_after"] == 80
    calls = {call["out"]: call["arguments"] for call in desk.calls()[2:]}
    assert "--resume" in calls["b"] and "--overwrite" not in calls["b"]
    assert "--resume" not in calls["c"]


def test_resume_does_not_take_another_recipe_for_done(desk):
    desk.queue(desk.job("a")).run()
    with pytest.raises(JobsError, match="exists"):
        desk.read(desk.job("a", ridge=0.5), resume=True)


def test_resume_runs_again_what_reads_an_output_that_is_made_again(desk):
    jobs = [desk.job("x/a"), {**desk.job("b"), "source": "x/a"}]
    desk.queue(*jobs).run()
    assert [o.status for o in desk.queue(*jobs, resume=True).run()] == ["skipped", "skipped"]
    (desk.root / "x" / "a" / "liar_report.json").unlink()
    (desk.root / "x" / "a").rmdir()
    outcomes = desk.queue(*jobs, resume=True, overwrite=True).run()
    assert [o.status for o in outcomes] == ["done", "done"]


def _send_when_ready(desk: Desk, number: int) -> threading.Thread:
    def send() -> None:
        for _ in range(600):
            if any(line.endswith("ready") for line in desk.heard):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_reaches_the_job_and_starts_no_other(desk, number):
    before = signal.signal(number, signal.default_int_handler)
    try:
        one = {"statistics": "oneshot"}
        queue = desk.queue(desk.job("a", **one), desk.job("slow", **one), desk.job("c", **one))
        thread = _send_when_ready(desk, number)
        outcomes = queue.run()
        thread.join()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert queue.interrupted
    assert _statuses(outcomes) == {"a": "done", "slow": "interrupted", "c": "not run"}
    assert outcomes[1].error == "interrupted; cleaned up"
    assert (desk.root / ".jobs.moments").is_dir(), "for --resume"
    assert "kept in" in desk.heard[-1]


def _through_the_command_line(desk, monkeypatch, *options: str) -> int:
    real = Queue.__init__

    def init(self, jobs, **rest):
        real(self, jobs, **{**rest, "command": desk.command})

    monkeypatch.setattr(Queue, "__init__", init)
    return main(["batch", "jobs.jsonl", *options])


def test_the_last_line_of_json_has_every_job(desk, monkeypatch, capsys):
    desk.write(desk.job("a"), desk.job("refused"))
    assert _through_the_command_line(desk, monkeypatch, "--json", "--sparsity", "0.4") == 1
    out, error = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["counts"] == {"done": 1, "failed": 1}
    assert [job["status"] for job in result["jobs"]] == ["done", "failed"]
    assert result["jobs"][0]["totals"]["sparsity"] == 0.4
    assert result["jobs"][1] | {"seconds": 0} == {
        "name": "refused",
        "line": 2,
        "source": "dense",
        "out": "refused",
        "status": "failed",
        "seconds": 0,
        "error": "--ridge 7: too steep",
        "totals": None,
    }
    assert error.splitlines()[-1].startswith("error: 1 of 2 jobs are not done; line 2, refused: ")


def test_the_table_has_a_row_for_every_job(desk, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    desk.write(desk.job("a", name="first [of two]"), desk.job("b"))
    assert _through_the_command_line(desk, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "first [of two]" in out and "0.800" in out and out.count("done") == 2


def test_an_interrupted_batch_prints_its_summary_and_one_line(desk):
    desk.write(desk.job("a"), desk.job("slow"), desk.job("c"))
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from liar_ext import job_queue\n"
        "real = job_queue.Queue.__init__\n"
        "def init(self, jobs, **rest):\n"
        f"    real(self, jobs, **rest, command=({sys.executable!r}, '-S', 'fake.py'))\n"
        "job_queue.Queue.__init__ = init\n"
        "from liar_ext.cli import main\n"
        "sys.exit(main(['batch', 'jobs.jsonl', '--json']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert child.stderr is not None
    heard = []
    for line in child.stderr:
        heard.append(line.rstrip())
        if line.rstrip() == "[slow] ready":
            child.send_signal(signal.SIGINT)
    out = child.stdout.read() if child.stdout else ""
    assert child.wait(60) == 2, heard
    assert heard[-1] == "error: interrupted: 2 of 3 jobs are not done; --resume goes on"
    assert [job["status"] for job in json.loads(out)["jobs"]] == ["done", "interrupted", "not run"]


def test_torchrun_is_refused_by_name(desk, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["batch", str(desk.write(desk.job("a")))]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_real_jobs_share_moments_and_give_what_prune_gives(inputs, tmp_path, capsys):
    jobs = [
        {"out": str(tmp_path / "a"), "sparsity": 0.5},
        {"out": str(tmp_path / "b"), "criterion": "flap", "target": "ffn,heads", "ridge": 1e-2},
        {"out": str(tmp_path / "c"), "statistics": "sequential"},
    ]
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(json.dumps({"source": str(inputs.llama), **j}) + "\n" for j in jobs))
    sizes = ["--samples", "32", "--seq-len", "32", "--calibration", str(inputs.text)]
    options = [*sizes, "--statistics", "oneshot"]
    assert main(["batch", str(file), *options, "--json", "--keep-moments"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["counts"] == {"done": 3}
    (folder,) = (tmp_path / ".jobs.moments").iterdir()
    assert len(list(folder.glob("layer-*.safetensors"))) == 4, "both kinds of both layers"
    seconds = [
        json.loads((Path(j["out"]) / "liar_report.json").read_text())["seconds"] for j in jobs
    ]
    assert [s["forward"] > 0 for s in seconds] == [False, True, True], "one forward for a and b"
    for job in jobs:
        recipe = Path(job["out"]) / "recipe.json"
        plain = tmp_path / "plain"
        again = ["prune", str(inputs.llama), "--out", str(plain), "--recipe", str(recipe)]
        assert main([*again, "--overwrite"]) == 0
        name = "model.safetensors"
        assert (plain / name).read_bytes() == (Path(job["out"]) / name).read_bytes()
    assert main(["batch", str(file), *options, "--json", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["counts"] == {"skipped": 3}
    MomentsStore.delete(folder)

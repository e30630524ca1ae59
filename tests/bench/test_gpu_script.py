"""`benchmarks/gpu.sh` on a machine without a GPU: a pretended python, and the refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")

# answers like a python on a GPU machine: what fails and what hangs is in FAIL and HANG
PRETENDED = """\
#!/usr/bin/env bash
echo "safe=${PYTHONSAFEPATH:-} $*" >>"$CALLS"
for word in $HANG; do [[ " $* " == *" $word "* ]] && exec sleep 30; done
for word in $FAIL; do [[ " $* " == *" $word "* ]] && { echo "$word fails"; exit 3; }; done
[[ " $* " == *" env --json "* ]] && printf '%s\\n' '{"device": "pretended"}' 'a warning'
[[ " $* " == *" pytest "* ]] && echo "$TESTS in 1.00s"
while (($#)); do [[ $1 == --out ]] && echo '{"device": "tuned"}' >"$2"; shift; done
exit 0
"""

# the results of the commands, without their dates
WRITTEN = [
    *("cosine-gpu.json", "depth-latency-llama-7b-width-gpu.json"),
    "depth-llama-7b-width-gpu.json",
    *("gram-gpu.json", "gram-other-gpu.json", "methods-demo-gpu.json"),
    *("prune-llama-70b-2-layers-gpu.json", "prune-llama-7b-gpu.json"),
    *("serve-compile-gpu.json", "serve-llama-3-8b-gpu.json", "serve-llama-7b-gpu.json"),
    "solve-gpu.json",
]


@pytest.fixture
def machine(tmp_path):
    """`run(**environment)`: the script with the pretended python; `calls`, what it was asked."""
    python = tmp_path / "python"
    python.write_text(PRETENDED)
    python.chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"

    def run(**environment: str):
        # PATH without compute-sanitizer, whatever this machine has
        bare = {"FAIL": "", "HANG": "", "TESTS": "9 passed"}
        bare |= {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nonexistent"}
        env = {**os.environ, **bare, "PYTHON": str(python), "OUT": str(out), "CALLS": str(calls)}
        done = subprocess.run(
            [BASH, str(SCRIPT)],
            env={**env, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        summary = json.loads((out / "summary-gpu.json").read_text())
        return done, {step["step"]: step for step in summary["steps"]}, summary

    run.calls, run.out = calls, out
    return run


def test_the_syntax_is_good():
    assert subprocess.run([BASH, "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    out = tmp_path / "out"
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(out)}
    done = subprocess.run([BASH, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no torch that sees a CUDA device")
    assert not out.exists()


def test_everything_runs_in_order_and_is_recorded(machine):
    done, steps, summary = machine()
    assert done.returncode == 0, done.stdout
    assert list(steps) == [
        *("build", "environment", "pytest", "gram", "gram-other", "solve", "cosine", "methods"),
        *("align", "serve-llama-7b", "serve-llama-3-8b"),
        *("model-depth", "depth", "depth-latency"),
        *(
            "model-7b",
            "prune-7b",
            "model-70b-2-layers",
            "prune-70b-2-layers",
            "memcheck",
            "tune",
            "serve-compile",
            "racecheck",
        ),
    ]
    assert summary["environment"] == {"device": "pretended"}
    assert summary["tuned"] == {"device": "tuned"}
    for name, step in steps.items():
        if name in ("memcheck", "racecheck"):
            assert step["rc"] is None
            assert "compute-sanitizer is neither" in step["reason"]
        else:
            assert (step["rc"], step["reason"]) == (0, "")
    calls = machine.calls.read_text()
    assert "bench gram --device cuda --dtypes bfloat16 --json" in calls
    assert "bench gram --device cuda --dtypes float16:11008 float32:11008 --json" in calls
    assert "-m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors" in calls
    assert "--durations=10 -n auto --maxprocesses 16 --dist worksteal\n" in calls
    # children of a python inherit this, and not its -P
    assert "safe=1 -P -m pytest" in calls
    assert calls.count("--json") == len(WRITTEN) + 1  # liar env prints its own
    shapes = "benchmarks/shapes/llama-3-8b"
    assert f"bench serve {shapes} {shapes}@0.3 {shapes}@0.5 --random --device cuda --dtype" in calls
    written = [Path(word).name for word in calls.split() if word.startswith(str(machine.out))]
    assert sorted(map(undated, written)) == sorted(["align-gpu.json", *WRITTEN])
    made = [undated(path.name) for path in machine.out.iterdir()]
    # the pretended python writes what is asked for with --out
    assert sorted(made) == ["align-gpu.json", "gpu.log", "summary-gpu.json"]


def undated(name: str) -> str:
    return re.sub(r"-\d{4}-\d\d-\d\d", "", name)


def test_serving_can_be_asked_for(machine):
    done, steps, _ = machine(STEPS="serve serve-compile")
    assert done.returncode == 0
    parts = ["align", "serve-llama-7b", "serve-llama-3-8b", "serve-compile"]
    assert list(steps) == ["build", "environment", *parts]
    calls = machine.calls.read_text().splitlines()
    compiled = next(call for call in calls if "--mode eager,compile" in call)
    assert compiled.count("@") == 1


def test_single_steps_can_be_asked_for(machine):
    done, steps, _ = machine(STEPS="solve prune-7b", PYTEST_ARGS="tests/ops")
    assert done.returncode == 0
    assert list(steps) == ["build", "environment", "solve", "model-7b", "prune-7b"]
    done, steps, _ = machine(STEPS="pytest", PYTEST_ARGS="tests/ops")
    assert list(steps) == ["build", "environment", "pytest"]
    assert "worksteal tests/ops\n" in machine.calls.read_text()


def test_what_is_no_step_is_refused_by_name(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETENDED)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "FAIL": "", "HANG": "", "STEPS": "gram,grams"}
    env |= {"CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out")}
    done = subprocess.run([BASH, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: STEPS=grams: no such step; choose from pytest gram ")


def test_without_a_parallel_pytest_the_tests_run_one_after_another(machine):
    done, steps, _ = machine(FAIL="xdist.scheduler")
    assert done.returncode == 0
    assert steps["pytest"]["rc"] == 0
    (call,) = [line for line in machine.calls.read_text().splitlines() if "-m pytest" in line]
    assert call.endswith("--durations=10")


def test_missing_packages_are_named_with_what_to_do(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETENDED)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "FAIL": "greenlet rich", "HANG": ""}
    env |= {"CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out")}
    done = subprocess.run([BASH, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {python} lacks greenlet rich: install them, or put them, unpacked, on PYTHONPATH\n"
    )


def test_a_failing_step_stops_nothing_and_shows_in_the_exit_code(machine):
    done, steps, _ = machine(FAIL="pytest-fails solve")
    assert done.returncode == 1
    assert steps["solve"]["rc"] == 3
    assert "solve fails" in (machine.out / "gpu.log").read_text()
    assert steps["tune"]["rc"] == 0


def test_tests_that_were_all_skipped_are_a_failure(machine):
    done, steps, _ = machine(TESTS="9 skipped")
    assert done.returncode == 1
    assert (steps["pytest"]["rc"], steps["gram"]["rc"]) == (1, 0)
    assert steps["pytest"]["reason"] == "no ' passed' in the output"


def test_a_failed_build_falls_back_to_pure_python(machine):
    done, steps, _ = machine(FAIL="pip")
    assert done.returncode == 1
    assert steps["build"]["rc"] == steps["build-python"]["rc"] == 3
    assert steps["gram"]["rc"] == 0


def test_a_step_that_hangs_is_ended_and_what_has_no_time_left_is_named(machine):
    done, steps, _ = machine(HANG="gpu", BUDGET="5")
    assert done.returncode == 1
    assert steps["pytest"]["rc"] == 124
    assert steps["pytest"]["reason"].startswith("limit of")
    assert steps["gram"]["rc"] is None
    assert "no time left of 5 s" in steps["gram"]["reason"]


def test_the_sanitizer_is_used_where_there_is_one(machine, tmp_path):
    done, steps, _ = machine(PATH=f"{sanitizer(tmp_path)}:/usr/bin:/bin")
    assert done.returncode == 0
    assert steps["memcheck"]["rc"] == steps["racecheck"]["rc"] == 0
    calls = machine.calls.read_text()
    for name in ("memcheck", "racecheck"):
        assert f"sanitizer --tool {name} --error-exitcode 9" in calls
    assert (ROOT / "tests" / "bench" / "test_sanitized.py").is_file()
    assert calls.count("-k not torch tests/bench/test_sanitized.py") == 2


@pytest.mark.parametrize(("tool", "code"), [("memcheck", 1), ("racecheck", 0)])
def test_what_racecheck_says_is_recorded_and_fails_nothing(machine, tmp_path, tool, code):
    done, steps, _ = machine(PATH=f"{sanitizer(tmp_path)}:/usr/bin:/bin", WRONG=tool)
    assert done.returncode == code
    assert steps[tool]["rc"] == 9
    said = "" if code else "recorded, and no failure of the script"
    assert steps[tool]["reason"] == said


def sanitizer(folder: Path) -> Path:
    """A folder with a compute-sanitizer for which the tool in WRONG finds something."""
    tool = folder / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/usr/bin/env bash\necho "sanitizer $*" >>"$CALLS"; echo "9 passed"\n'
        '[[ $2 != "${WRONG:-}" ]] || exit 9\n'
    )
    tool.chmod(0o755)
    return tool.parent

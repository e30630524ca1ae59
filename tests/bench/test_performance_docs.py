"""`docs/performance.md` is what the committed results give, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from liar_ext.bench.goals import GOALS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def generate(out: Path, *words: str) -> None:
    script = ROOT / "benchmarks" / "performance.py"
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(out), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    generate(out)
    return out


def test_the_committed_page_is_what_the_results_give(made):
    committed = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert (made / "performance.md").read_text(encoding="utf-8") == committed, (
        "docs/performance.md differs from benchmarks/results: run python benchmarks/performance.py"
    )


def test_the_committed_plots_are_those_of_the_results(made):
    committed = sorted(path.name for path in (DOCS / "performance").glob("*.svg"))
    assert sorted(path.name for path in (made / "performance").glob("*.svg")) == committed
    for name in committed:
        content = (DOCS / "performance" / name).read_text(encoding="utf-8")
        version = re.search(r"Matplotlib v([\d.]+)", content)
        assert version is not None
        if version[1] != matplotlib.__version__:
            pytest.skip(f"plots were made by matplotlib {version[1]}, here is another")
        assert (made / "performance" / name).read_text(encoding="utf-8") == content, name


def test_without_results_every_goal_is_unmeasured(tmp_path):
    (tmp_path / "results").mkdir()
    generate(tmp_path, "--results", str(tmp_path / "results"))
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert page.count("| unmeasured |") == len(GOALS)
    assert "Nothing here ran on a GPU yet" in page
    assert "**assumed**" in page


def test_the_newest_result_of_a_device_counts_and_a_gpu_is_judged(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    environment = {"device": "Some GPU", "torch": "2.11", "triton": "3.6", "threads": 16}
    row = {"n": 4096, "tokens": 9, "dtype": "bfloat16", "case": "triangle", "variant": "triton"}
    row |= {"ok": True, "ours": True, "chosen": True, "error": 1e-7, "bias": 0.0}
    row |= {"ms": 1.0, "gflops": 2e5, "share": 0.2, "peak_bytes": 2**20}
    # 74 ms are predicted for these six products of three planes; memory needs less
    three = row | {"n": 11008, "tokens": 32768, "dtype": "float32", "ratio": 4.5, "ms": 100.0}
    for date, ratio in (("2030-01-02", 1.9), ("2030-01-01", 1.1)):
        data = {
            "benchmark": "gram",
            "device": "cuda",
            "date": date,
            "environment": environment,
            "ceilings": {
                "matmul_gflops": {"bfloat16": 3.22e5, "float32": 5e4},
                "copy_gbytes": 4000.0,
            },
            "multiprocessors": 132,
            "rows": [row | {"ratio": ratio}, three],
        }
        (results / f"gram-{date}.json").write_text(json.dumps(data))
    generate(tmp_path, "--results", str(results))
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "| Some GPU | times as fast as the baseline ≥ 1.80 | 1.90 | reached |" in page
    assert "measured matmul rate ≥ 0.85 | 0.20 | **missed** |" in page
    assert "| 1.10 |" not in page
    assert "Measured on Some GPU" in page
    assert "compute, as 6 bfloat16 products | 73.99 | 100 | 0.74 |" in page
    assert "28.3 rounds of tiles on 132 multiprocessors, 2%" in page
    assert "**assumed**" not in page

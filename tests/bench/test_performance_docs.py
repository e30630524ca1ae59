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


@pytest.mark.parametrize("files", [1, 2])
def test_the_newest_result_of_a_device_counts_and_a_gpu_is_judged(tmp_path, files):
    results = tmp_path / "results"
    results.mkdir()
    environment = {"device": "Some GPU", "torch": "2.11", "triton": "3.6", "threads": 16}
    row = {"n": 4096, "tokens": 9, "dtype": "bfloat16", "case": "triangle", "variant": "triton"}
    row |= {"ok": True, "ours": True, "chosen": True, "error": 1e-7, "bias": 0.0}
    row |= {"ms": 1.0, "gflops": 2e5, "share": 0.2, "peak_bytes": 2**20}
    # 74 ms are predicted for these six products of three planes; memory needs less
    three = row | {"n": 11008, "tokens": 32768, "dtype": "float32", "ratio": 4.5, "ms": 100.0}
    ceilings = {"bfloat16": 3.22e5, "float32": 5e4}

    def write(name, date, dtypes, rows, **fields):
        data = {
            "benchmark": "gram",
            "device": "cuda",
            "date": date,
            "environment": environment,
            "ceilings": {
                "matmul_gflops": {dtype: ceilings[dtype] for dtype in dtypes},
                "copy_gbytes": 4000.0,
            },
            "multiprocessors": 132,
            "rows": rows,
            "absent": {dtype: {"cpu": f"{name} has none"} for dtype in dtypes},
            **fields,
        }
        (results / f"{name}.json").write_text(json.dumps(data))

    new = [row | {"ratio": 1.9}, row | {"ratio": 1.7, "chosen": False, "variant": "cuda:256x2"}]
    old = [row | {"ratio": 1.1}, three | {"ratio": 3.3}]
    write("outdated", "2030-01-01", ceilings, old, problems=["triton for bfloat16: superseded"])
    if files == 1:
        write("new", "2030-01-02", ceilings, [*new, three])
    else:
        # one file for each dtype, and midnight between them
        write("new", "2030-01-02", ["bfloat16"], new)
        write("new-other", "2030-01-03", ["float32"], [three], note="the second half")
    generate(tmp_path, "--results", str(results))
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert "| Some GPU | times as fast as the baseline ≥ 1.80 | 1.90 | reached |" in page
    assert "measured matmul rate ≥ 0.85 | 0.20 | **missed** |" in page
    assert "| Some GPU | times as fast as the baseline ≥ 4.00 | 4.50 | reached |" in page
    assert not re.search(r"\| 1\.10 \||\| 3\.30 \||outdated|superseded", page)
    assert "`cuda:256x2`" in page
    assert page.count("## Gram: Some GPU") == 1
    assert page.count("`results/new") == files
    assert ("the second half" in page) == (files == 2)
    assert "Measured on Some GPU" in page
    assert "compute, as 6 bfloat16 products | 73.99 | 100 | 0.74 |" in page
    assert "28.3 rounds of tiles on 132 multiprocessors, 2%" in page
    assert "**assumed**" not in page


def test_a_dtype_that_the_newest_result_lacks_stays(tmp_path):
    committed = next((ROOT / "benchmarks" / "results").glob("gram-cpu-*.json"))
    data = json.loads(committed.read_text(encoding="utf-8"))
    data["problems"] = ["triton for float32: still so", "cpu bfloat16 n=9 failed: superseded"]
    (tmp_path / "gram-old.json").write_text(json.dumps(data))
    data["problems"] = []
    data["date"] = "2999-01-01"
    data["ceilings"]["matmul_gflops"].pop("float32")
    data["absent"].pop("float32")
    data["rows"] = [row for row in data["rows"] if row["dtype"] == "bfloat16"]
    (tmp_path / "gram-new.json").write_text(json.dumps(data))
    generate(tmp_path, "--results", str(tmp_path))
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert page.index("gram-old.json") < page.index("gram-new.json")
    assert "still so" in page
    assert "superseded" not in page
    whole = (DOCS / "performance.md").read_text(encoding="utf-8")
    # the GPUs' tables come before that of the device of the committed result
    whole = whole[whole.index(f"## Gram: {data['environment']['device'].split(' (')[0]}") :]
    head = "| n | T | dtype |"
    assert sorted(page.partition(head)[2].splitlines()[:20]) == sorted(
        whole.partition(head)[2].splitlines()[:20]
    )


def test_cosines_on_a_gpu_are_judged_and_shown(tmp_path):
    row = {"n": 4096, "tokens": 9, "dtype": "bfloat16", "case": "all", "variant": "triton"}
    row |= {"ok": True, "ours": True, "chosen": True, "error": 1e-7, "peak_bytes": 2**20}
    row |= {"ms": 1.0, "gbytes": 3200.0, "bandwidth": 0.7, "ratio": 4.5}
    data = {
        "benchmark": "cosine",
        "device": "cuda",
        "date": "2030-01-01",
        "environment": {"device": "Some GPU", "torch": "2.11", "triton": "3.6", "threads": 16},
        "ceilings": {"copy_gbytes": 4571.0},
        "rows": [row, row | {"case": "half", "ratio": None}, row | {"ok": False, "ms": None}],
        "absent": {"bfloat16": {}, "float32": {"triton": "it is broken"}},
    }
    data["rows"] = [{k: v for k, v in one.items() if v is not None} for one in data["rows"]]
    (tmp_path / "cosine.json").write_text(json.dumps(data))
    generate(tmp_path, "--results", str(tmp_path))
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (
        "| Some GPU | bytes a second over those of a large copy ≥ 0.80 | 0.70 | **missed** |"
        in page
    )
    assert "| Some GPU | times as fast as the baseline ≥ 4.00 | 4.50 | reached |" in page
    assert "`liar bench cosine --sizes 4096 --dtypes bfloat16`" in page
    assert "## Cosines: Some GPU" in page
    assert "copy 4.57e+03 GB/s" in page
    figures = "| 1 | 3.2e+03 | 0.70 | {} | 1.0e-07 | 1 |"
    start = "| 4096 | 9 | bfloat16 | **triton** |"
    assert page.count(start) == 2
    assert f"{start} all {figures.format('4.50')}" in page
    assert f"{start} half {figures.format('')}" in page
    assert "- no `triton`: it is broken (float32)" in page

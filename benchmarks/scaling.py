"""`liar prune` under torchrun with several numbers of ranks: seconds by phase, and the same result.

    python benchmarks/scaling.py --ranks 1,2,4 --json FILE

A LLaMA of random weights (`random_llama`), one thread a rank, so that 1 rank is one core. Weights
and Selections are compared before any speed is printed: 1e-6 of the largest weight of a tensor.
Each number of ranks runs `--rounds` times, in turns; the result is the run with the median total.
The phases are rank 0's. On fewer cores than ranks, more ranks cannot be faster: `note` says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_llama import make
from safetensors.torch import load_file

from liar_ext.environment import environment

TOLERANCE = 1e-6
PHASES = ("forward", "gram", "solve", "hold", "load", "write", "total")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIMIT_SECONDS = 1800


def prune(source: Path, out: Path, ranks: int, options: list[str]) -> dict[str, Any]:
    """One compression; its report, with `process`, the seconds of all processes with imports."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-P", "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["liar_ext", "prune", str(source), "--out", str(out), *options]
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=out.parent,  # not the repository: its `kernels/` hides a package
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    if done.returncode:
        raise SystemExit(f"error: {ranks} ranks failed:\n{done.stderr}")
    report = json.loads((out / "liar_report.json").read_text())
    report["seconds"]["process"] = time.perf_counter() - started
    return report


def weight_difference(one: Path, other: Path) -> float:
    """Of any tensor the largest difference over its largest weight; infinite for other shapes."""
    largest = 0.0
    for path in sorted(one.glob("*.safetensors")):
        first, second = load_file(path), load_file(other / path.name)
        if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
            return float("inf")
        for name, tensor in first.items():
            gap = (tensor.double() - second[name].double()).abs().max()
            largest = max(largest, float(gap / tensor.double().abs().max().clamp(1e-30)))
    return largest


def same_selections(one: dict[str, Any], other: dict[str, Any], folders: tuple[Path, Path]) -> bool:
    """Widths as the reports have them; which units, by the rows of the producers, never changed."""
    keys = ("name", "units_after", "columns_after")
    if [[s[k] for k in keys] for s in one["sites"]] != [
        [s[k] for k in keys] for s in other["sites"]
    ]:
        return False
    for path in sorted(folders[0].glob("*.safetensors")):
        first, second = load_file(path), load_file(folders[1] / path.name)
        producers = [n for n in first if n.endswith(("up_proj.weight", "v_proj.weight"))]
        if not all(torch.equal(first[name], second[name]) for name in producers):
            return False
    return True


def scaling(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = make(
        folder,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        layers=arguments.layers,
        vocabulary=1024,
        tokens=arguments.tokens,
        dtype=torch.float32,
    )
    window = min(256, arguments.tokens)
    options = ["--calibration", str(folder / "tokens.npy"), "--sparsity", "0.3"]
    options += ["--samples", str(arguments.tokens // window), "--seq-len", str(window)]
    options += ["--batch-size", "4", "--target", arguments.target, "--device", "cpu"]
    load_before = os.getloadavg()
    sizes = arguments.ranks
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    problems, rows = [], []
    for _ in range(arguments.rounds):
        for size in sizes:
            runs[size].append(prune(source, folder / f"ranks-{size}", size, options))
    first = sizes[0]
    typical = {
        size: min(found, key=lambda r, m=_median(found): abs(r["seconds"]["total"] - m))
        for size, found in runs.items()
    }
    base = typical[first]["seconds"]
    for size in sizes:
        report, folders = typical[size], (folder / f"ranks-{first}", folder / f"ranks-{size}")
        seconds = report["seconds"]
        row = {
            "ranks": size,
            "seconds": seconds,
            "totals": [r["seconds"]["total"] for r in runs[size]],
            "forward_scaling": base["forward"] / seconds["forward"],
            "gram_scaling": base["gram"] / seconds["gram"],
            "total_scaling": base["total"] / seconds["total"],
            "weight_difference": weight_difference(*folders),
            "same_selections": same_selections(typical[first], report, folders),
            "peak_host_bytes": report["run"]["peak_host_bytes"],
        }
        rows.append(row)
        if not (row["weight_difference"] <= TOLERANCE and row["same_selections"]):
            problems.append(
                f"{size} ranks: weights differ by {row['weight_difference']:.1e}, selections "
                f"{'agree' if row['same_selections'] else 'differ'}"
            )
    cores = len(os.sched_getaffinity(0))
    note = arguments.note or ""
    if max(sizes) > cores:
        few = f"{cores} cores: more than {cores} ranks share them and cannot be faster than {cores}"
        note = "; ".join(filter(None, (note, few)))
    names = ("hidden", "ffn", "layers", "tokens", "target", "rounds")
    return {
        "benchmark": "scaling",
        "model": {name: getattr(arguments, name) for name in names},
        "relative_to": first,
        "cores": cores,
        "environment": environment(torch.device("cpu")),
        "load": {"before": load_before, "after": os.getloadavg()},
        "note": note,
        "problems": problems,
        "rows": rows,
    }


def _median(reports: list[dict[str, Any]]) -> float:
    return statistics.median(report["seconds"]["total"] for report in reports)


def show(result: dict[str, Any]) -> None:
    print("ranks " + " ".join(f"{phase:>9}" for phase in PHASES), end="")
    print("   forward ×     gram ×    total ×  difference  selections")
    for row in result["rows"]:
        print(f"{row['ranks']:5d} ", end="")
        print(" ".join(f"{row['seconds'][phase]:8.2f}s" for phase in PHASES), end="")
        # no speed for a wrong result
        wrong = any(problem.startswith(f"{row['ranks']} ranks") for problem in result["problems"])
        for name in ("forward_scaling", "gram_scaling", "total_scaling"):
            print(f" {'-' if wrong else format(row[name], '.2f'):>10}", end="")
        print(f" {row['weight_difference']:11.1e}", end="")
        print(f"  {'same' if row['same_selections'] else 'DIFFERENT'}")
    print(result["note"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4", help="the first is the baseline")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="4096 a rank at least")
    parser.add_argument("--target", default="ffn")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--note", help="what else ran on the machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.ranks = [int(part) for part in arguments.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="liar-scaling-") as folder:
        result = scaling(arguments, Path(folder))
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for problem in result["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whole layers on a real model: every method, with and without repair, beside widths of equal size.

    python benchmarks/depth.py demo --work build/depth       # the model that ships with the package
    python benchmarks/depth.py demo --report                 # table from the committed JSON
    python benchmarks/depth.py cost --model DIR --calibration FILE   # time and memory only

Each cell is `liar prune` in a process of its own, so that its peak memory is its own; a run that is
stopped goes on where it was. Latency is measured once for each number of layers, all models by
turns in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"
METHODS = (
    *("reverse", "shortgpt", "streamline", "angular", "perplexity", "perplexity-greedy"),
    *("taylor", "magnitude-l1", "magnitude-l2", "random"),
)
REPAIRS = {
    "none": {"span_repair": "none"},
    "liar": {"span_repair": "liar"},
    "stream": {"span_repair": "liar", "target_signal": "stream"},
    "refit all": {"span_repair": "liar", "target_signal": "stream", "refit": "all"},
}
SIZES = {"samples": 128, "seq_len": 256, "batch_size": 16}
WIDTHS = {"criterion": "obs", "target": "ffn,heads"}
# layers that go, and the share of the widths of the others that makes up the rest of the size
EQUAL = {
    1: ((0, 0.2), (1, 0)),
    2: ((0, 0.4), (1, 0.25), (2, 0)),
    3: ((0, 0.6), (1, 0.5), (2, 1 / 3)),
}


def cells(cost: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recipe fields."""
    for drop in (1,) if cost else (1, 2, 3):
        for method in METHODS:
            for repair, fields in REPAIRS.items():
                if cost and repair in ("stream", "refit all") and method != "streamline":
                    continue
                yield f"{method}/{drop}/{repair}", {"depth": method, "drop": drop, **fields}
    if cost:
        return
    for drop, pairs in EQUAL.items():
        for layers, sparsity in pairs:
            fields: dict[str, Any] = {"target_signal": "stream", "refit": "all"}
            if layers:
                fields |= {"depth": "perplexity-greedy", "drop": layers}
            if sparsity:
                fields |= {**WIDTHS, "sparsity": sparsity}
            yield f"equal/{drop}/{layers}", fields


def pruned(source: Path, out: Path, calibration: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The report of one `liar prune`; `--json` of a process of its own."""
    options = {**SIZES, "calibration": calibration, **fields}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-P", "-m", "liar_ext", "prune", str(source), "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, *flags, "--overwrite", "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    return report | {"process_seconds": time.perf_counter() - began}


def row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "dropped": report["layers"].get("dropped", []),
        "parameters": report["totals"]["parameters_after"],
        "seconds": report["seconds"]["total"],
        "peak_host_bytes": report["run"]["peak_host_bytes"],
        "residuals": {s["name"]: s["relative_residual"] for s in report["sites"] if s["across"]},
    }


def latencies(folders: dict[int, Path], repeats: int = 15) -> dict[int, dict[str, float]]:
    """Seconds of a prefill of 256 tokens and of a decoded token, by layers; medians by turns."""
    import torch

    import liar_ext

    models = {n: liar_ext.load(path, dtype=torch.float32) for n, path in folders.items()}
    ids = torch.randint(3, 200, (1, 256), generator=torch.Generator().manual_seed(0))
    found: dict[int, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in models}
    with torch.inference_mode():
        for _ in range(repeats):
            for n, model in models.items():
                began = time.perf_counter()
                cache = model(ids, use_cache=True).past_key_values
                found[n]["prefill"].append(time.perf_counter() - began)
                began = time.perf_counter()
                for at in range(32):
                    model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                found[n]["decode"].append((time.perf_counter() - began) / 32)
    return {n: {k: statistics.median(v) for k, v in own.items()} for n, own in found.items()}


def run(arguments: argparse.Namespace) -> None:
    import torch

    import liar_ext
    from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
    from liar_ext.engine.inputs import load_tokenizer
    from liar_ext.environment import environment
    from liar_ext.evaluation.task import Evaluation

    cost = arguments.name == "cost"
    source = arguments.model if cost else Path(MODEL)
    calibration = arguments.calibration or str(CALIBRATION)
    work = arguments.work or ROOT / "build" / "depth"
    work.mkdir(parents=True, exist_ok=True)
    journal = work / f"{arguments.name}.json"
    data = json.loads(journal.read_text()) if journal.exists() else {"rows": {}}
    measure = None
    if not cost:
        # as the grids of widths evaluate
        measure = Evaluation("text", str(HELDOUT), 256, 16, 128).on(load_tokenizer(source))
        if "dense" not in data:
            data["dense"] = measure(liar_ext.load(source, dtype=torch.float32))["value"]
    shortest: dict[int, Path] = {}
    for name, fields in cells(cost):
        out = work / "out"
        if name in data["rows"]:
            continue
        report = pruned(source, out, calibration, fields)
        data["rows"][name] = row(name, report)
        if measure is not None:
            found = measure(liar_ext.load(out, dtype=torch.float32))
            data["rows"][name] |= {k: found[k] for k in ("value", "standard_error")}
        print(name, data["rows"][name], flush=True)
        journal.write_text(json.dumps(data))
    if not cost:
        shortest = {5: source}
        for drop in (1, 2, 3):
            shortest[5 - drop] = work / f"layers-{5 - drop}"
            pruned(
                source,
                shortest[5 - drop],
                calibration,
                {"depth": "reverse", "drop": drop} | REPAIRS["none"],
            )
        data["latency"] = latencies(shortest)
    data["environment"] = environment()
    data["command"] = "python benchmarks/depth.py " + arguments.name
    (RESULTS / f"depth-{arguments.name}.json").write_text(json.dumps(data, indent=1) + "\n")


def report() -> None:
    """`docs/results/depth.md`, from the JSON."""
    data = json.loads((RESULTS / "depth-demo.json").read_text())
    rows, env = data["rows"], data["environment"]
    lines = [
        "# Whole layers of the demo LLaMA",
        "",
        f"Perplexity of the first 128 windows of 256 held-out tokens, dense {data['dense']:.2f}; "
        "32,768 calibration tokens; five layers. Layers that went in brackets, counted from 0. "
        f"{env['device']}, torch {env['torch']}, transformers {env['transformers']}. Made by "
        "`python benchmarks/depth.py demo`; JSON in `benchmarks/results/depth-demo.json`.",
    ]
    for drop in (1, 2, 3):
        size = rows[f"reverse/{drop}/none"]["parameters"]
        lines += ["", f"## {drop} of 5 layers left out ({size:,} parameters)", ""]
        lines += [
            f"| method | layers | {' | '.join(REPAIRS)} |",
            f"|---|---|{'---:|' * len(REPAIRS)}",
        ]
        for method in METHODS:
            own = [rows[f"{method}/{drop}/{repair}"] for repair in REPAIRS]
            gone = ", ".join(map(str, own[0]["dropped"]))
            # with a repair the first layer stays
            other = (
                ""
                if own[1]["dropped"] == own[0]["dropped"]
                else (f" [{', '.join(map(str, own[1]['dropped']))}]")
            )
            values = [
                f"{r['value']:.2f}" if r["value"] < 1000 else f"{r['value']:.0f}" for r in own
            ]
            values[1] += other
            lines.append(f"| `{method}` | {gone} | {' | '.join(values)} |")
    lines += ["", "## Width and depth at equal size", ""]
    lines += ["| about as large as | layers left out | widths | parameters | perplexity |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for drop, pairs in EQUAL.items():
        for layers, sparsity in pairs:
            own = rows[f"equal/{drop}/{layers}"]
            lines.append(
                f"| {5 - drop} layers | {layers} | {100 * sparsity:.0f} % | "
                f"{own['parameters']:,} | {own['value']:.2f} |"
            )
    lines += ["", "## Latency", "", "| layers | prefill of 256 tokens | one token |"]
    lines += ["|---:|---:|---:|"]
    for layers, own in data["latency"].items():
        prefill, decode = (f"{own[k] * 1e3:.2f} ms" for k in ("prefill", "decode"))
        lines.append(f"| {layers} | {prefill} | {decode} |")
    (DOCS / "depth.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("demo", "cost"))
    parser.add_argument("--model", type=Path, help="cost: a checkpoint")
    parser.add_argument("--calibration", help="default: the package's own text")
    parser.add_argument("--work", type=Path, help="default build/depth")
    parser.add_argument("--report", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments)
    if arguments.name == "demo":
        report()


if __name__ == "__main__":
    main()

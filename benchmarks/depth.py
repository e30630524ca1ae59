"""Whole layers on a real model: every method, with and without repair, beside widths of equal size.

    python benchmarks/depth.py demo --work build/depth       # the model that ships with the package
    python benchmarks/depth.py demo --report                 # table from the committed JSON

First every method chooses; then each choice that any of them has made is pruned once with each
repair. Each is `liar prune` in a process of its own, so that its peak memory is its own; a run that
is stopped goes on where it was. Latency is measured once for each number of layers, all models by
turns in this process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import depth_latency

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
REPEATS = 25
WIDTHS = {"criterion": "obs", "target": "ffn,heads"}
# layers that go, and the share of the widths of the others that makes up the rest of the size
EQUAL = {
    1: ((0, 0.2), (1, 0)),
    2: ((0, 0.4), (1, 0.25), (2, 0)),
    3: ((0, 0.6), (1, 0.5), (2, 1 / 3)),
}


def chosen(source: Path, calibration: str, drops: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What each method leaves out, by `METHOD/N/none` or `/liar`: with a repair the first layer
    stays; and the seconds of choosing."""
    import torch

    import liar_ext
    from liar_ext import Recipe
    from liar_ext.depth.choice import choose
    from liar_ext.engine.clock import Clock
    from liar_ext.engine.inputs import load_calibration
    from liar_ext.engine.runtime import Runtime
    from liar_ext.engine.store import InMemory
    from liar_ext.evaluation.mode import inference

    model = liar_ext.load(source, dtype=torch.float32)
    base = Recipe(calibration=calibration, **SIZES)
    batches = load_calibration(source, model, base).batches
    found = {}
    with inference(model):
        for drop, method, repair in itertools.product(drops, METHODS, ("none", "liar")):
            recipe = replace(base, sparsity=0, depth=method, drop=drop, span_repair=repair)
            runtime = Runtime(InMemory(model), model.device, Clock(model.device))
            began = time.perf_counter()
            choice = choose(recipe, runtime, batches)
            seconds = time.perf_counter() - began
            found[f"{method}/{drop}/{repair}"] = {"dropped": choice.dropped, "seconds": seconds}
    return found


def cells(choices: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recipe fields: each choice of layers with each repair, and widths of equal size."""
    for name, choice in choices.items():
        dropped = ",".join(map(str, choice["dropped"]))
        for repair, fields in REPAIRS.items():
            if (repair == "none") == name.endswith("/none"):
                yield f"{dropped}/{repair}", {"drop_layers": dropped, **fields}
    for drop, pairs in EQUAL.items():
        for layers, sparsity in pairs:
            fields = {"target_signal": "stream", "refit": "all"}
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


def latencies(source: Path) -> dict[int, dict[str, float]]:
    """Medians of a prompt of 256 tokens and of a token after it, by layers that are left."""
    found = depth_latency.measure(
        source, [0, 1, 2, 3], device="cpu", batch=1, seq_len=256, repeats=REPEATS
    )
    return {
        row["layers"]: {kind: row[f"{kind}_seconds"]["p50"] for kind in ("prefill", "decode")}
        for row in found["rows"]
    }


def run(arguments: argparse.Namespace) -> None:
    import torch

    import liar_ext
    from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
    from liar_ext.engine.inputs import load_tokenizer
    from liar_ext.environment import environment
    from liar_ext.evaluation.task import Evaluation

    source, calibration = Path(MODEL), str(CALIBRATION)
    work = arguments.work or ROOT / "build" / "depth"
    work.mkdir(parents=True, exist_ok=True)
    journal = work / "demo.json"
    data = json.loads(journal.read_text()) if journal.exists() else {"rows": {}}
    # as the grids of widths evaluate
    measure = Evaluation("text", str(HELDOUT), 256, 16, 128).on(load_tokenizer(source))
    if "choices" not in data:
        data["dense"] = measure(liar_ext.load(source, dtype=torch.float32))["value"]
        data["choices"] = chosen(source, calibration, (1, 2, 3))
        journal.write_text(json.dumps(data))
    for name, fields in cells(data["choices"]):
        if name in data["rows"]:
            continue
        out = work / "out"
        data["rows"][name] = row(name, pruned(source, out, calibration, fields))
        found = measure(liar_ext.load(out, dtype=torch.float32))
        data["rows"][name] |= {k: found[k] for k in ("value", "standard_error")}
        print(name, data["rows"][name], flush=True)
        journal.write_text(json.dumps(data))
    data["latency"] = latencies(source)
    data |= {"environment": environment(), "command": "python benchmarks/depth.py demo"}
    (RESULTS / "depth-demo.json").write_text(json.dumps(data, indent=1) + "\n")


def report() -> None:
    """`docs/results/depth.md`, from the JSON."""
    data = json.loads((RESULTS / "depth-demo.json").read_text())
    rows, choices, env = data["rows"], data["choices"], data["environment"]
    lines = [
        "# Whole layers of the demo LLaMA",
        "",
        f"Perplexity of the first 128 windows of 256 held-out tokens (`liar eval DIR --text TEXT "
        f"--seq-len 256 --windows 128`), dense {data['dense']:.2f}; "
        "32,768 calibration tokens; five layers, counted from 0. `none` repairs nothing, `liar` "
        "the consumer in front of a gap, `stream` aims at the dense stream, `refit all` fits all "
        "consumers behind as well. "
        f"{env['device']}, torch {env['torch']}, transformers {env['transformers']}. Made by "
        "`python benchmarks/depth.py demo`; JSON in `benchmarks/results/depth-demo.json`.",
    ]
    for drop in (1, 2, 3):
        lines += ["", f"## {drop} of 5 layers left out", ""]
        lines.append(f"| method | layers | {' | '.join(REPAIRS)} |")
        lines.append(f"|---|---|{'---:|' * len(REPAIRS)}")
        for method in METHODS:
            gone = {
                repair: ",".join(map(str, choices[f"{method}/{drop}/{repair}"]["dropped"]))
                for repair in ("none", "liar")
            }
            shown = gone["none"]
            if gone["liar"] != shown:
                # with a repair the first layer stays
                shown += f" (repaired: {gone['liar']})"
            own = [rows[f"{gone[r if r == 'none' else 'liar']}/{r}"]["value"] for r in REPAIRS]
            values = [f"{value:.{2 if value < 1000 else 0}f}" for value in own]
            lines.append(f"| `{method}` | {shown} | {' | '.join(values)} |")
    lines += ["", "## Width and depth at equal size", ""]
    lines += ["FFN and heads of the layers that stay, criterion `obs`, `--refit all`; layers by "]
    lines[-1] += "`perplexity-greedy`."
    lines += ["", "| about as large as | layers left out | widths | parameters | perplexity |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for drop, pairs in EQUAL.items():
        for layers, sparsity in pairs:
            cell = rows[f"equal/{drop}/{layers}"]
            lines.append(
                f"| {5 - drop} layers | {layers} | {100 * sparsity:.0f} % | "
                f"{cell['parameters']:,} | {cell['value']:.2f} |"
            )
    lines += [
        "",
        "## Latency",
        "",
        f"CPU, float32, 2 threads, nothing else running; medians of {REPEATS} by turns; of the "
        "prompt the logits of the last token (`benchmarks/depth_latency.py`).",
    ]
    lines += ["", "| layers | prefill of 256 tokens | one token |"]
    lines += ["|---:|---:|---:|"]
    for layers, times in data["latency"].items():
        prefill, decode = (f"{times[k] * 1e3:.2f} ms" for k in ("prefill", "decode"))
        lines.append(f"| {layers} | {prefill} | {decode} |")
    lines += larger() + every_command()
    (DOCS / "depth.md").write_text("\n".join(lines) + "\n")


def larger() -> list[str]:
    """What `benchmarks/gpu.sh` has measured of a model of random weights, if it has."""
    lines = []
    for file in sorted(RESULTS.glob("depth-llama-*.json")):
        data = json.loads(file.read_text())
        env, recipe = data["environment"], data["recipe"]
        forward = data["forward_seconds"]["median"]
        lines += ["", f"## What each takes: {data['source']}", ""]
        lines += [
            f"{env['device']}, torch {env['torch']}, {recipe['dtype']} dtype; {recipe['drop']} "
            f"layers left out, {data['tokens']:,} calibration tokens, of which one plain forward "
            f"takes {forward:.2f} s; in memory, `--target-signal {recipe['target_signal']}`, "
            f"layers by `{recipe['depth']}` where nothing else is said. Memory is what comes on "
            f"top of the dense model. Once each; `{file.name}`.",
        ]
        lines += ["", "| | forwards | memory |", "|---|---:|---:|"]
        for row in data["rows"]:
            name = f"`--{row['method'].replace('_', '-')} {row['name']}`"
            shown = name if row["method"] else "the recipe as it is"
            lines.append(f"| {shown} | {row['forwards']:.2f} | {row['bytes'] / 1e9:.1f} GB |")
    for file in sorted(RESULTS.glob("depth-latency-*.json")):
        data = json.loads(file.read_text())
        env = data["environment"]
        title = file.stem.removeprefix("depth-latency-")
        lines += ["", f"Latency of {title} ({env['device']}, {data['dtype']}, eager, batch "]
        lines[-1] += f"{data['batch']}, medians of {data['repeats']} by turns; `{file.name}`):"
        lines += ["", f"| layers | prefill of {data['seq_len']} tokens | one token |"]
        lines += ["|---:|---:|---:|"]
        for row in data["rows"]:
            times = (row[f"{k}_seconds"]["p50"] * 1e3 for k in ("prefill", "decode"))
            prefill, decode = (f"{t:.2f} ms" for t in times)
            lines.append(f"| {row['layers']} | {prefill} | {decode} |")
    return lines


def every_command() -> list[str]:
    """What `benchmarks/depth_commands.py` has measured, if it has."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("depth-commands-*.json")):
        data = json.loads(file.read_text())
        env, shape, tokens, trained = (
            data[key] for key in ("environment", "shape", "tokens", "trained")
        )
        rows = {(row["name"], row["layers"]): row for row in data["rows"]}
        loading, one = rows["loading", 0], rows["one forward", 0]
        forward = one["cpu_seconds"] - loading["cpu_seconds"]
        names = dict.fromkeys(name for name, layers in rows if layers)
        lines += ["", "## What every command takes at 1 to 3 layers", ""]
        lines += [
            f"A LLaMA of random weights, {shape['layers']} layers, {shape['hidden']} wide, FFN "
            f"{shape['ffn']}, vocabulary {shape['vocabulary']:,}; {env['device']}, torch "
            f"{env['torch']}, one thread, float32. Processes from disk to disk, their CPU seconds "
            "without those of loading the model "
            f"({loading['cpu_seconds']:.1f} s), in plain forwards of the "
            f"{tokens['samples'] * tokens['seq_len']:,} calibration tokens ({forward:.1f} s); "
            "peaks of the whole process at 3 layers, loading alone "
            f"{loading['peak_bytes'] / 1e9:.2f} GB. "
            f"Trainings are {trained['steps']} updates of {trained['batch_size']} windows of "
            f"{trained['seq_len']} tokens: {trained['steps'] * trained['batch_size']} windows, 4 "
            "times the calibration's. `grow` inserts as many layers; `recover` trains what is left "
            f"without the last layers. Quality of random weights says nothing. `{file.name}`, made "
            "by `python benchmarks/depth_commands.py`.",
        ]
        lines += ["", "| | 1 layer | 2 layers | 3 layers | memory |", "|---|---:|---:|---:|---:|"]
        for name in names:
            own = [rows[name, layers] for layers in (1, 2, 3)]
            cells = [f"{(r['cpu_seconds'] - loading['cpu_seconds']) / forward:.1f}" for r in own]
            peak = f"{own[-1]['peak_bytes'] / 1e9:.2f} GB"
            lines.append(f"| `{name}` | {' | '.join(cells)} | {peak} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("demo",))
    parser.add_argument("--work", type=Path, help="default build/depth")
    parser.add_argument("--report", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments)
    report()


if __name__ == "__main__":
    main()

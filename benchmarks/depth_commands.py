"""What every command on whole layers takes at 1 to 3 layers, on a LLaMA of random weights.

    python benchmarks/depth_commands.py             # half an hour of a core
    python benchmarks/depth.py demo --report        # table from the committed JSON

Each command is a process of its own on one thread, so that its CPU seconds and its peak memory are
its own and what else runs hardly counts. Beside them a process that loads the model and runs its
tokens once. A run that is stopped goes on where it was. Nothing is said of quality: the weights
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import random_llama
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = {"hidden": 768, "ffn": 2048, "layers": 12, "vocabulary": 8192, "key_value_heads": 2}
TOKENS = {"samples": 16, "seq_len": 256, "batch_size": 8}
TRAINED = {"steps": 8, "seq_len": 256, "batch_size": 8, "accumulation": 1, "held_out": 2}
METHODS = (
    *("reverse", "shortgpt", "streamline", "angular", "perplexity", "perplexity-greedy"),
    *("taylor", "magnitude-l1", "random"),
)
FORWARD = """
import sys, torch, numpy as np, liar_ext
model = liar_ext.load(sys.argv[1], dtype=torch.float32)
tokens = torch.from_numpy(np.load(sys.argv[2])[:{total}]).view(-1, {seq_len})
with torch.inference_mode():
    for _ in range(int(sys.argv[3])):
        for batch in tokens.split({batch_size}):
            model.model(batch, use_cache=False)
"""


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def commands(model: Path, tokens: Path, out: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Name, layers, and the arguments of `python`."""
    liar = ["-P", "-m", "liar_ext"]
    source = [str(model), "--out", str(out), "--overwrite", "--json", "--device=cpu"]
    text = flags({"calibration": tokens, **TOKENS, "search_samples": 8, "gradient_samples": 8})
    train = flags({"train": tokens, **TRAINED})
    total = TOKENS["samples"] * TOKENS["seq_len"]
    forward = FORWARD.format(total=total, **TOKENS)
    for times in (0, 1):
        name = "one forward" if times else "loading"
        yield name, 0, ["-P", "-c", forward, str(model), str(tokens), str(times)]
    for drop in (1, 2, 3):
        for method in METHODS:
            yield (
                f"prune --depth {method}",
                drop,
                [*liar, "prune", *source, *text, f"--depth={method}", f"--drop={drop}"],
            )
        kind = ["--depth=reverse", f"--drop={drop}"]
        for name, own in {
            "--span-repair none": ["--span-repair=none"],
            "--target-signal stream": ["--target-signal=stream"],
            "--refit all": ["--target-signal=stream", "--refit=all", "--depth=shortgpt"],
        }.items():
            yield f"prune {name}", drop, [*liar, "prune", *source, *text, *kind, *own]
        merged = flags({"calibration": tokens, "texts": 16, "seq_len": 256})
        yield "merge", drop, [*liar, "merge", *source, *merged, f"--drop={drop}"]
        for loss in ("mse", "lm"):
            own = [*train, f"--drop={drop}", f"--loss={loss}", "--samples=16"]
            yield f"replace --loss {loss}", drop, [*liar, "replace", *source, *own]
        for predictor in ("mlp", "ridge"):
            own = [f"--layers={drop}", f"--predictor={predictor}"]
            yield f"grow --predictor {predictor}", drop, [*liar, "grow", *source, *own]
        yield "grow, trained", drop, [*liar, "grow", *source, f"--layers={drop}", *train]
        for method in ("partial", "lora"):
            own = [
                *train,
                f"--method={method}",
                *(["--last=1", "--no-head"] if method == "partial" else []),
            ]
            short = [str(out.with_name(f"short-{drop}")), *source[1:]]
            yield f"recover --method {method}", drop, [*liar, "recover", *short, *own]


def measured(arguments: list[str]) -> dict[str, float]:
    """CPU seconds and most resident bytes of a process, which has to succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{said[0].decode()}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def run(work: Path, name: str) -> None:
    from liar_ext.environment import environment

    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.npy"
    if not tokens.exists():
        random_llama.make(work, dtype=torch.float32, tokens=1 << 16, **SHAPE)
    model, out, journal = work / "model", work / "out", work / "rows.json"
    for drop in (1, 2, 3):
        short = work / f"short-{drop}"
        if not short.exists():
            line = ["-P", "-m", "liar_ext", "prune", str(model), "--out", str(short)]
            measured([*line, f"--drop-layers={12 - drop}-11"])
    rows = json.loads(journal.read_text()) if journal.exists() else []
    done = {(row["name"], row["layers"]) for row in rows}
    for title, layers, arguments in commands(model, tokens, out):
        if (title, layers) not in done:
            rows.append({"name": title, "layers": layers, **measured(arguments)})
            print(rows[-1], flush=True)
            journal.write_text(json.dumps(rows))
    data = {
        "shape": SHAPE,
        "tokens": TOKENS,
        "trained": TRAINED,
        "threads": 1,
        "rows": rows,
        "environment": environment(),
        "command": "python benchmarks/depth_commands.py",
    }
    (RESULTS / f"depth-commands-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "depth-commands")
    parser.add_argument("--name", default="cpu", help="of the JSON file")
    arguments = parser.parse_args()
    run(arguments.work, arguments.name)


if __name__ == "__main__":
    main()

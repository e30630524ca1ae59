"""A window of the demo LLaMA replaced by one trained layer, beside what is repaired in closed form.

    python benchmarks/replace.py --json FILE
    python benchmarks/replace.py --report FILE        # the table of `docs/replace.md`

For each number of layers fewer: `liar replace --drop N` with each loss; the same layers left out
and repaired by `liar prune --drop-layers`; and the closed form with layers chosen for it. All of
one number are of one size. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import liar_ext
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.depth import drop_layers
from liar_ext.depth.replace import Replacement, replace_layers
from liar_ext.depth.replace.settings import SCHEDULES
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.environment import environment
from liar_ext.evaluation.task import Evaluation
from liar_ext.recovery import Schedule, TextTraining

DROPS = (1, 2, 3)
STEPS, RATE, BATCH, SEQ_LEN = 100, 1e-3, 8, 256
# as `benchmarks/depth.py`: 32,768 tokens
CLOSED = {
    "calibration": str(CALIBRATION),
    "samples": 128,
    "seq_len": SEQ_LEN,
    "batch_size": 16,
    "span_repair": "liar",
    "target_signal": "stream",
    "refit": "all",
}
TRAINED: dict[str, dict[str, Any]] = {
    "mse": {"loss": "mse"},
    "lm": {"loss": "lm"},
    "mse normalised": {"loss": "mse", "loss_tokens": "normalised"},
}


def asked(drop: int, fields: dict[str, Any]) -> Replacement:
    """LLM-Streamline's schedule for a small model: a higher rate, fewer windows in an update."""
    own = {**SCHEDULES[fields["loss"]], "accumulation": 1}
    schedule = Schedule(STEPS, learning_rate=RATE, batch_size=BATCH, **own)
    return Replacement(TextTraining(str(CALIBRATION), schedule, SEQ_LEN), drop=drop, **fields)


def closed(drop: int, gone: list[int]) -> dict[str, dict[str, Any]]:
    """The layers that a replacement saves, and layers chosen for the closed form."""
    found: dict[str, dict[str, Any]] = {
        "same layers, nothing": {"drop_layers": gone, "span_repair": "none"},
        "same layers, closed form": {"drop_layers": gone},
    }
    for depth in ("streamline", "perplexity-greedy"):
        found[f"{depth}, closed form"] = {"depth": depth, "drop": drop}
    return found


def made(out: Path, drop: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Write one result; what is told of it."""
    if "loss" in fields:
        report = replace_layers(MODEL, out, asked(drop, fields), overwrite=True)
        told, layers = report["training"], report["layers"]
        return {
            "replaced": layers["replaced"],
            "trained": layers["trained"],
            "seconds": report["seconds"],
            "tokens": told["tokens"],
            "held_out": told["held_out"],
            "kept": told["kept"],
            "nothing": told.get("nothing"),
            "parameters": report["totals"]["parameters_after"],
        }
    if fields.get("span_repair") == "none":
        report = drop_layers(MODEL, out, fields["drop_layers"], overwrite=True)
        return {
            "dropped": report["layers"]["dropped"],
            "seconds": report["seconds"],
            "parameters": report["totals"]["parameters_after"],
        }
    report = liar_ext.compress(MODEL, out, liar_ext.Recipe(**CLOSED, **fields), overwrite=True)
    return {
        "dropped": report.layers["dropped"],
        "seconds": report.seconds["total"],
        "tokens": report.calibration["tokens"],
        "parameters": report.totals["parameters_after"],
    }


def run(target: Path, drops: Sequence[int], note: str | None) -> None:
    measure = Evaluation("text", str(HELDOUT), SEQ_LEN, 16, 128).on(load_tokenizer(MODEL))
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"rows": []}
    result |= {"note": note, "environment": environment()}
    result |= {"command": "python benchmarks/replace.py", "steps": STEPS, "rate": RATE}
    result |= {"windows_of_an_update": BATCH, "seq_len": SEQ_LEN}
    if "dense" not in result:
        result["dense"] = measure(liar_ext.load(MODEL, dtype=torch.float32))["value"]
    known = {(row["drop"], row["name"]): row for row in result["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"

        def cell(drop: int, name: str, fields: dict[str, Any]) -> dict[str, Any]:
            if (drop, name) not in known:
                began = time.process_time()
                row = {"drop": drop, "name": name, **made(out, drop, fields)}
                # of this process: on a machine that others use, too, the clock says little
                row["cpu_seconds"] = time.process_time() - began
                found = measure(liar_ext.load(out, dtype=torch.float32))
                row |= {"perplexity": found["value"], "error": found["standard_error"]}
                known[drop, name] = row
                print(drop, name, row["perplexity"], row["seconds"], flush=True)
                result["rows"] = list(known.values())
                target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            return known[drop, name]

        for drop in drops:
            replaced = cell(drop, "mse", TRAINED["mse"])["replaced"]
            for name, fields in {**closed(drop, replaced[1:]), **TRAINED}.items():
                cell(drop, name, fields)


def report(target: Path) -> None:
    """The table, as Markdown."""
    data = json.loads(target.read_text(encoding="utf-8"))
    cell = {(row["drop"], row["name"]): row for row in data["rows"]}
    drops = sorted({drop for drop, _ in cell})
    print(
        f"| dense {data['dense']:.2f} | {' | '.join(f'{d} fewer' for d in drops)} | CPU seconds |"
    )
    print(f"|---|{'---:|' * len(drops)}---:|")
    for name in dict.fromkeys(row["name"] for row in data["rows"]):
        own = [cell.get((drop, name)) for drop in drops]
        values = " | ".join("–" if row is None else f"{row['perplexity']:.2f}" for row in own)
        seconds = " / ".join("–" if row is None else f"{row['cpu_seconds']:.0f}" for row in own)
        print(f"| {name} | {values} | {seconds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, help="measure, and write here")
    what.add_argument("--report", type=Path, help="print the table of such a file")
    parser.add_argument("--drops", type=int, nargs="+", default=DROPS, help="layers fewer")
    parser.add_argument("--note", help="what else ran")
    arguments = parser.parse_args()
    if arguments.report is not None:
        report(arguments.report)
    else:
        run(arguments.json, arguments.drops, arguments.note)


if __name__ == "__main__":
    main()

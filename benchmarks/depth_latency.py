"""Prefill and decode latency of a model without its last layers, all by turns in one process.

    python benchmarks/depth_latency.py MODEL --drops 0,1,2,3 --json FILE [--device cuda]

The shorter models share the tensors of the first: which layers go makes no difference to time.
Eager transformers with a cache that grows, as `generate` has it; the loop is that of `liar bench
serve`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import liar_ext
from liar_ext.bench.measure import quantiles
from liar_ext.bench.serve_lanes import Decoding
from liar_ext.bench.serve_prompts import drawn
from liar_ext.checkpoint.reader import parameter_count
from liar_ext.depth.surgery import surgery
from liar_ext.environment import environment

STEPS = 16


@torch.no_grad()
def measure(
    folder: Path, drops: list[int], *, device: str, batch: int, seq_len: int, repeats: int
) -> dict[str, Any]:
    model = liar_ext.load(folder, device=torch.device(device))
    layers = model.config.num_hidden_layers
    models = {drop: surgery(model, range(layers - drop)) for drop in drops}
    ids = drawn(batch, seq_len, model.config.vocab_size, torch.device(device))
    lanes = {drop: Decoding(own, ids, STEPS + 1, "eager") for drop, own in models.items()}
    times: dict[int, list[dict[str, float]]] = {drop: [] for drop in drops}
    for number in range(repeats + 2):
        for drop, lane in lanes.items():
            found = lane.round()
            # the first two rounds warm up
            if number >= 2:
                times[drop].append(found)
    return {
        "benchmark": "depth-latency",
        "model": folder.name,
        "dtype": str(model.dtype),
        "batch": batch,
        "seq_len": seq_len,
        "repeats": repeats,
        "rows": [
            {
                "layers": layers - drop,
                "parameters": parameter_count(models[drop]),
                **{
                    f"{phase}_seconds": quantiles([own[phase] for own in times[drop]])
                    for phase in ("prefill", "decode")
                },
            }
            for drop in drops
        ],
        "environment": environment(torch.device(device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--drops", default="0,1,2,3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    options = vars(arguments)
    out, folder = options.pop("json"), options.pop("model")
    drops = [int(part) for part in options.pop("drops").split(",")]
    found = measure(folder, drops, **options)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        prefill, decode = (row[f"{k}_seconds"]["p50"] * 1e3 for k in ("prefill", "decode"))
        print(f"{row['layers']} layers: prefill {prefill:.2f} ms, a token {decode:.2f} ms")


if __name__ == "__main__":
    main()

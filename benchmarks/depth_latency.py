"""Prefill and decode latency of a model without its last layers, all by turns in one process.

    python benchmarks/depth_latency.py MODEL --drops 0,1,2,3 --json FILE [--device cuda]

The shorter models share the tensors of the first: which layers go makes no difference to time.
Eager transformers with a cache that grows, as `generate` has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import liar_ext
from liar_ext.checkpoint.reader import parameter_count
from liar_ext.depth.surgery import surgery
from liar_ext.environment import environment

STEPS = 16


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, found


def one_round(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prompt, and of a token after it."""

    def prefill() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode(cache: Any) -> None:
        for at in range(STEPS):
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)

    first, cache = timed(ids.device, prefill)
    return first, timed(ids.device, lambda: decode(cache))[0] / STEPS


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


@torch.inference_mode()
def measure(
    folder: Path, drops: list[int], *, device: str, batch: int, seq_len: int, repeats: int
) -> dict[str, Any]:
    model = liar_ext.load(folder, device=torch.device(device))
    layers = model.config.num_hidden_layers
    models = {drop: surgery(model, range(layers - drop)) for drop in drops}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, seq_len), generator=generator)
    ids = ids.to(device)
    times: dict[int, tuple[list[float], list[float]]] = {drop: ([], []) for drop in drops}
    for number in range(repeats + 2):
        for drop, own in models.items():
            found = one_round(own, ids)
            # the first two rounds warm up
            for value, kept in zip(found, times[drop], strict=True):
                if number >= 2:
                    kept.append(value)
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
                "prefill_seconds": spread(times[drop][0]),
                "decode_seconds": spread(times[drop][1]),
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

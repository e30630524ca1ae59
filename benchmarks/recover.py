"""A little training after closed-form pruning: the last layers, or adapters with three rank rules.

    python benchmarks/recover.py demo --work build/recover    # the model that ships in the package
    python benchmarks/recover.py demo --report                # table from the committed JSON

Two pruned models, one without its last two layers and one with half of its FFN and heads, both
repaired by least squares. Learning rates are chosen first, for each method, by the loss on held-out
windows of the text that is trained on, never by the text that the table is about. All cells of a
seed have the same updates on the same windows. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"
PRUNED = {
    "depth": {"sparsity": 0, "drop_layers": (3, 4)},
    "width": {"sparsity": 0.5, "target": ("ffn", "heads")},
}
SIZES = {"samples": 128, "seq_len": 256, "batch_size": 16}
CELLS: dict[str, dict[str, Any]] = {
    "partial, untied head": {"method": "partial", "untie": True},
    "partial, no head": {"method": "partial", "head": False},
    "lora uniform": {"method": "lora"},
    "lora residual": {"method": "lora", "ranks": "residual"},
    "lora performance": {"method": "lora", "ranks": "performance"},
}
RATES = {"partial": (1e-4, 2e-4, 5e-4, 1e-3), "lora": (5e-4, 2e-3, 5e-3)}
STEPS, RATE_STEPS, WINDOWS = 100, 30, 4
SEARCH = {"initial": 5, "rounds": 4, "steps": 20}
SEEDS = (0, 1, 2)


def trained(
    source: Path, out: Path, dense: Path, text: str, rate: float, steps: int, seed: int, **own: Any
) -> dict[str, Any]:
    """The report of one `liar recover`."""
    from liar_ext.recovery.rank_search import RankSearch
    from liar_ext.recovery.run import recover
    from liar_ext.recovery.schedule import Schedule
    from liar_ext.recovery.settings import Recovery

    schedule = Schedule(
        steps, learning_rate=rate, batch_size=WINDOWS, seed=seed, evaluate_every=steps
    )
    given = {"dense": str(dense)} if own.get("ranks") == "residual" else {}
    recovery = Recovery(
        *(text, schedule), seq_len=256, held_out=16, search=RankSearch(**SEARCH), **given, **own
    )
    return recover(source, out, recovery, overwrite=True)


def run(arguments: argparse.Namespace) -> None:
    import torch

    import liar_ext
    from liar_ext import Recipe
    from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
    from liar_ext.engine.inputs import load_tokenizer
    from liar_ext.environment import environment
    from liar_ext.evaluation.task import Evaluation

    dense, text = Path(MODEL), str(CALIBRATION)
    work = arguments.work or ROOT / "build" / "recover"
    work.mkdir(parents=True, exist_ok=True)
    journal = work / "demo.json"
    data: dict[str, Any] = {"pruned": {}, "rates": {}, "rows": {}}
    if journal.exists():
        data = json.loads(journal.read_text())
    # as the grids of widths evaluate
    measure = Evaluation("text", str(HELDOUT), 256, 16, 128).on(load_tokenizer(dense))

    def measured(folder: Path) -> dict[str, float]:
        found = measure(liar_ext.load(folder, dtype=torch.float32))
        return {name: found[name] for name in ("value", "standard_error")}

    def keep() -> None:
        journal.write_text(json.dumps(data))

    if "dense" not in data:
        data["dense"] = measured(dense)
    for case, fields in PRUNED.items():
        if case not in data["pruned"] or not (work / case).exists():
            recipe = Recipe(calibration=text, **SIZES, **fields)
            found = liar_ext.compress(dense, work / case, recipe, overwrite=True)
            parameters = found.totals["parameters_after"]
            data["pruned"][case] = {"parameters": parameters, **measured(work / case)}
            keep()
    for method, rates in RATES.items():
        own = CELLS["partial, untied head" if method == "partial" else "lora uniform"]
        for rate in rates:
            name = f"{method}/{rate}"
            if name not in data["rates"]:
                report = trained(
                    work / "width", work / "out", dense, text, rate, RATE_STEPS, 0, **own
                )
                data["rates"][name] = report["training"]["held_out"][-1]["loss"]
                print(name, data["rates"][name], flush=True)
                keep()
    for seed in SEEDS[: arguments.seeds]:
        for case in arguments.case or PRUNED:
            for name, own in CELLS.items():
                key = f"{case}/{name}/{seed}"
                if key in data["rows"] or name not in (arguments.cell or CELLS):
                    continue
                rate = chosen_rate(data["rates"], own["method"])
                began = time.perf_counter()
                report = trained(work / case, work / "out", dense, text, rate, STEPS, seed, **own)
                seconds = time.perf_counter() - began
                training = report["training"]
                data["rows"][key] = {
                    **measured(work / "out"),
                    "seconds": seconds,
                    "training_seconds": training["seconds"],
                    "trained": training["parameters"],
                    "parameters": report["totals"]["parameters_after"],
                    "rate": rate,
                    "losses": [look["loss"] for look in training["held_out"]],
                    **{k: training[k] for k in ("ranks", "trials") if k in training},
                }
                print(key, data["rows"][key], flush=True)
                keep()
    data |= {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "command": "python benchmarks/recover.py demo",
    }
    keep()
    collect(data)


def collect(data: dict[str, Any]) -> None:
    """Add what was measured to the committed JSON: cases and seeds can be run apart."""
    path = RESULTS / "recover-demo.json"
    if path.exists():
        data = {**data, "rows": {**json.loads(path.read_text())["rows"], **data["rows"]}}
    path.write_text(json.dumps(data, indent=1) + "\n")


def chosen_rate(losses: dict[str, float], method: str) -> float:
    """That of the least loss on held-out windows of the text that is trained on; of losses that
    are the same to a thousandth the highest, as these are of fewer steps."""
    return min(RATES[method], key=lambda rate: (round(losses[f"{method}/{rate}"], 3), -rate))


def report() -> None:
    """`docs/results/recover.md`, from the JSON."""
    data = json.loads((RESULTS / "recover-demo.json").read_text())
    rows, env = data["rows"], data["environment"]
    seeds = sorted({int(key.rpartition("/")[2]) for key in rows})
    rates = {method: chosen_rate(data["rates"], method) for method in RATES}
    lines = [
        "# A little training after pruning, on the demo LLaMA",
        "",
        f"Perplexity of the first 128 windows of 256 held-out tokens, dense "
        f"{data['dense']['value']:.2f}. {STEPS} updates of {WINDOWS} windows of 256 tokens of the "
        "calibration text, which the demo model was trained on itself; rank 8, and as many "
        "parameters where ranks differ. Learning rates by held-out windows of that text: "
        f"{rates['partial']:g} (partial), {rates['lora']:g} (lora). Seeds "
        f"{', '.join(map(str, seeds))}; a perplexity has a standard error of about "
        f"{data['dense']['standard_error']:.1f} (of the text, the same for all). {env['device']}, "
        f"{data['threads']} thread, torch {env['torch']}, transformers {env['transformers']}, on "
        "a machine that others used as well: compare seconds with one another only. Made by "
        "`python benchmarks/recover.py demo`; JSON in `benchmarks/results/recover-demo.json`.",
    ]
    titles = {
        "depth": "The last two of five layers left out",
        "width": "FFN and heads 50 %, default `liar`",
    }
    for case, title in titles.items():
        pruned = data["pruned"][case]
        lines += ["", f"## {title}", ""]
        shown = " | ".join(f"seed {seed}" for seed in seeds)
        lines += [f"| | trained parameters | {shown} | seconds | ranks by seed |"]
        lines += [f"|---|---:|{'---:|' * len(seeds)}---:|---|"]
        blank = " | ".join(["", *[""] * len(seeds)])
        lines += [f"| without training | 0 | {pruned['value']:.2f} {blank}| |"]
        for name in CELLS:
            own = {s: rows[key] for s in seeds if (key := f"{case}/{name}/{s}") in rows}
            if not own:
                continue
            cells = " | ".join(f"{own[s]['value']:.2f}" if s in own else "–" for s in seeds)
            every = [" ".join(map(str, row["ranks"])) for row in own.values() if "ranks" in row]
            ranks = "; ".join(dict.fromkeys(every))
            seconds = statistics.mean(row["seconds"] for row in own.values())
            trained_parameters = next(iter(own.values()))["trained"]
            lines.append(f"| {name} | {trained_parameters:,} | {cells} | {seconds:.0f} | {ranks} |")
    lines += ["", "Seconds are of the whole command; of `performance` most are its trials."]
    (DOCS / "recover.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("demo",))
    parser.add_argument("--work", type=Path, help="default build/recover")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of them")
    parser.add_argument("--case", nargs="+", choices=tuple(PRUNED), help="only these")
    parser.add_argument("--cell", nargs="+", choices=tuple(CELLS), help="only these")
    parser.add_argument("--report", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments)
    report()


if __name__ == "__main__":
    main()

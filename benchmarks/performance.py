"""`docs/performance.md` and its plots, from the committed JSON in `benchmarks/results`.

    python benchmarks/performance.py            # after new results were put there

Only what is in those files is shown. Of each benchmark and device the newest result counts, of Gram
the newest of each dtype.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performance_cosine import cosine_table
from performance_plots import plot_gram, plot_solve
from performance_roofline import roofline

from liar_ext.bench.goals import GOALS, Goal, judge

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PLOTS = "performance"
Result = dict[str, Any]

INTRODUCTION = """\
# Performance

Made by `python benchmarks/performance.py` from the JSON in `benchmarks/results`, and from nothing
else: a figure that is not here has not been measured. Every result was checked against float64
before it was timed, its baseline ran in the same process in alternation with it, and times are
medians; the JSON also has the 20th and 80th percentile, versions, and the load of the machine.

*Useful* rates count the multiplications that are needed, whatever an implementation does: `n² T`
for the triangle of a Gram matrix (half of what `x.T @ x` does), `s² T + 2(n − s) s T` for the panel
of `s` kept columns, `s³/3 + 2s²r` for a solve. *Share* is that rate over the rate of a large square
product of random values by the library, measured in the same run.
"""

GRAM_HEAD = """\
| n | T | dtype | version | ms | useful TFLOP/s | share | × baseline | error | bias | MiB |
|---|---|---|---|---|---|---|---|---|---|---|"""
SOLVE_TEXT = """\
Ours has ridge, scaling, `P`, condition estimate and residual in it; the library's versions get
`A + λI` ready made and report nothing. × baseline: over float64 `cholesky_ex` and two
`solve_triangular`."""
ACCURACY_TEXT = """\
Forward error of `Q` for one system of {size}, known solution, no ridge asked for. Where float32
Moments cannot tell the smallest eigenvalue from rounding, the ridge is raised, and every step is
reported; the error is then that of the ridge."""
PRUNE_TEXT = """\
## A whole compression beside one plain forward

Same model, batches, dtype and device, alternating. In memory, or streamed from disk to disk with
reading and writing included. Peak memory is the process's, or the GPU's where there is one.
`liar bench prune`.

| result | device | tokens | removed | how | forward, s | compression, s | ratio | Gram, s \
| solve, s | peak, GiB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def load(folder: Path) -> list[Result]:
    """The newest result of each benchmark, device and model; of Gram, the newest of each dtype."""
    newest: dict[tuple[Any, ...], Result] = {}
    grams: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("benchmark") not in ("gram", "solve", "cosine", "prune", "tune"):
            continue
        # results before there was a GPU harness do not say what kind of device they are from
        data.setdefault("device", "cpu")
        data.setdefault("date", "")
        data["file"] = path.name
        if data["benchmark"] == "gram":
            grams.setdefault(data["environment"]["device"], []).append(data)
            continue
        # early results call every model `model`; their tokens tell them apart
        model = (data.get("source"), data.get("tokens"))
        key = (data["benchmark"], data["environment"]["device"], model)
        if key not in newest or data["date"] >= newest[key]["date"]:
            newest[key] = data
    return [
        *(combined(grams[device]) for device in sorted(grams)),
        *(newest[key] for key in sorted(newest, key=str)),
    ]


def combined(results: Sequence[Result]) -> Result:
    """One Gram result of a device: a run may write one file for each dtype that it measures.

    Each dtype is of the newest file that has it; `parts` are those that were used.
    """
    seen: set[str] = set()
    parts: list[Result] = []
    # of one date, the last by name
    for data in sorted(results, key=lambda data: (data["date"], data["file"]), reverse=True):
        own = set(data["ceilings"]["matmul_gflops"])
        if own - seen:
            parts.append(without(data, own & seen))
        seen |= own
    newest = parts[0]
    # as they were measured: a run starts with what matters most
    parts.reverse()
    ceilings = [part["ceilings"] for part in parts]
    return newest | {
        "parts": parts,
        "ceilings": {
            "matmul_gflops": {k: v for one in ceilings for k, v in one["matmul_gflops"].items()},
            "copy_gbytes": newest["ceilings"]["copy_gbytes"],
        },
        "absent": {k: v for part in parts for k, v in part.get("absent", {}).items()},
        "rows": [row for part in parts for row in part["rows"]],
        "problems": [problem for part in parts for problem in part.get("problems", [])],
    }


def without(data: Result, dtypes: set[str]) -> Result:
    """A Gram result with nothing about `dtypes`."""
    rates = data["ceilings"]["matmul_gflops"]
    return data | {
        "ceilings": data["ceilings"]
        | {"matmul_gflops": {name: rate for name, rate in rates.items() if name not in dtypes}},
        "absent": {k: v for k, v in data.get("absent", {}).items() if k not in dtypes},
        "rows": [row for row in data["rows"] if row["dtype"] not in dtypes],
        "problems": [
            problem
            for problem in data.get("problems", [])
            if dtypes.isdisjoint(re.findall(r"\w+", problem))
        ],
    }


def of(results: Sequence[Result], benchmark: str) -> list[Result]:
    """Results of one benchmark, those of a GPU first."""
    found = [data for data in results if data["benchmark"] == benchmark]
    return sorted(found, key=lambda data: data["device"] != "cuda")


def command(goal: Goal) -> str:
    """The one command that shows this goal's line."""
    where = goal.where
    if goal.benchmark == "gram":
        size = f" --sizes {where['n']}" if "n" in where else ""
        return f"liar bench gram{size} --dtypes {where['dtype']}"
    if goal.benchmark == "cosine":
        return f"liar bench cosine --sizes {where['n']} --dtypes {where['dtype']}"
    if "batch" in where:
        return f"liar bench solve --cases {where['batch']}x{where['s']}"
    return "liar bench solve --cases"


def goal_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| | device | goal | measured | | command |",
        "|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        verdicts = [
            (judge(goal, data), data["environment"]["device"])
            for data in of(results, goal.benchmark)
            if goal.device in (None, data["device"])
        ] or [(judge(goal, None), {"cuda": "GPU", "cpu": "CPU", None: "any"}[goal.device])]
        for verdict, device in verdicts:
            value = "" if verdict.value is None else goal.shown(verdict.value)
            best = f" (best: {verdict.best})" if verdict.best else ""
            state = f"**{verdict.state}**" if verdict.state == "missed" else verdict.state
            lines.append(
                f"| {goal.line} | {device} | {goal.text} | {value}{best} | {state} "
                f"| `{command(goal)}` |"
            )
    return lines


def heading(kind: str, data: Result) -> list[str]:
    lines = [f"## {kind}: {data['environment']['device']}"]
    for part in data.get("parts", [data]):
        env, machine = part["environment"], part.get("machine", {})
        before, after = (machine.get(when, {}).get("load_1min") for when in ("before", "after"))
        load = "" if None in (before, after) else f", load {before:g} to {after:g}"
        triton = f", triton {env['triton']}" if part["device"] == "cuda" else ""
        lines += [
            "",
            f"`results/{part['file']}`: {part['date'] or 'undated'}, torch {env['torch']}{triton}, "
            f"{env['threads']} threads{load}.",
        ]
        if part.get("note"):
            lines += ["", part["note"]]
    return [*lines, ""]


def gram_section(data: Result) -> list[str]:
    rates = data["ceilings"]
    shown = ", ".join(f"{n} {v / 1e3:.3g} TFLOP/s" for n, v in rates["matmul_gflops"].items())
    lines = [
        *heading("Gram", data),
        f"Measured ceilings: product {shown}; copy {rates['copy_gbytes']:.3g} GB/s.",
        "",
        f"![useful rate]({PLOTS}/{plot_name('gram', data)})",
        "",
        GRAM_HEAD,
    ]
    timed = [row for row in data["rows"] if "ms" in row]
    for row in timed:
        if row["case"] == "triangle":
            peak = row.get("peak_bytes")
            name = f"**{row['variant']}**" if row.get("chosen") else f"`{row['variant']}`"
            lines.append(
                f"| {row['n']} | {row['tokens']} | {row['dtype']} | {name} | {row['ms']:.4g} "
                f"| {row['gflops'] / 1e3:.3g} | {row['share']:.2f} | {row['ratio']:.2f} "
                f"| {row['error']:.1e} | {_number(row.get('bias'), '.1e')} "
                f"| {_number(peak and peak / 2**20, '.0f')} |"
            )
    lines += [
        "",
        "Bold: what runs if nothing is forced. Bias: mean signed error of the diagonal on `|x|`.",
        "",
        "Keep F: only `G_SS` and `G_MS` of that fraction of the columns, which come first in `x`",
        "(prefix) or are anywhere (scattered). Product: without the column sums.",
        "",
        "| n | dtype | version | case | ms | beside the triangle | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in timed:
        if row["case"] != "triangle":
            beside = (
                f"{row['extraction']:.2f} × its share of tiles"
                if "extraction" in row
                else f"{row['overhead']:+.1%}"
            )
            lines.append(
                f"| {row['n']} | {row['dtype']} | {row['variant']} | {row['case']} "
                f"| {row['ms']:.4g} | {beside} | {row['share']:.2f} |"
            )
    return [*lines, *outside(data)]


def outside(data: Result) -> list[str]:
    """What has no speed here, and why."""
    lines = [f"- not run: {problem}" for problem in data.get("problems", [])]
    groups: dict[str, dict[str, None]] = {}
    for key, absent in data.get("absent", {}).items():
        # by dtype where one dtype can run and another cannot
        for name, why in absent.items() if isinstance(absent, dict) else [(key, absent)]:
            groups.setdefault(f"- no `{name}`: {why}", {})[key] = None
    for text, dtypes in groups.items():
        some = isinstance(data["absent"], dict) and len(dtypes) < len(data["absent"])
        by_dtype = data["benchmark"] in ("gram", "cosine") and some
        lines.append(f"{text} ({', '.join(dtypes)})" if by_dtype else text)
    reasons = {f"- no `{r['variant']}`: {r['reason']}": None for r in data["rows"] if "reason" in r}
    return ["", *lines, *reasons] if lines or reasons else []


def solve_section(data: Result) -> list[str]:
    lines = [
        *heading("Solve", data),
        SOLVE_TEXT,
        "",
        f"![time]({PLOTS}/{plot_name('solve', data)})",
        "",
        "| batch | s | r | version | ms | GFLOP/s | × baseline | forward error | backward error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        if row["kind"] == "time" and "ms" in row:
            name = f"**{row['variant']}**" if row.get("chosen") else f"`{row['variant']}`"
            lines.append(
                f"| {row['batch']} | {row['s']} | {row['r']} | {name} | {row['ms']:.4g} "
                f"| {row['gflops']:.3g} | {row['ratio']:.2f} | {row['forward_error']:.1e} "
                f"| {row['backward_error']:.1e} |"
            )
    lines += [*outside(data), "", *accuracy_table(data)]
    return lines


def accuracy_table(data: Result) -> list[str]:
    """Forward error at each condition: versions as columns, ladder steps counted."""
    rows = [row for row in data["rows"] if row["kind"] == "condition" and "failed" not in row]
    if not rows:
        return []

    def column(row: dict[str, Any]) -> str:
        return f"{row['variant']}, {row['moments']} moments" if "moments" in row else row["variant"]

    def cell(row: dict[str, Any]) -> str:
        steps = len(row.get("steps", []))
        # the last step says whether the ridge, and so the system, is another one
        raised = steps and "raised" in row["steps"][-1]
        note = f" ({steps} step{'s' * (steps > 1)}{', ridge raised' if raised else ''})"
        return f"{row['forward_error']:.1e}{note if steps else ''}"

    names = list(dict.fromkeys(column(row) for row in rows))
    cells = {(row["condition"], column(row)): cell(row) for row in rows}
    lines = [
        ACCURACY_TEXT.format(size=rows[0]["s"]),
        "",
        "| condition | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        shown = " | ".join(cells.get((condition, name), "") for name in names)
        lines.append(f"| {condition:.0e} | {shown} |")
    return lines


def prune_section(results: Sequence[Result]) -> list[str]:
    lines = [PRUNE_TEXT]
    for data in of(results, "prune"):
        recipe, phases = data["recipe"], data["phases"]
        spread = f"{data['ratio']['min']:.2f} to {data['ratio']['max']:.2f}"
        lines.append(
            f"| `{data['file']}` | {data['environment']['device']} | {data['tokens']} "
            f"| {' + '.join(recipe['target'])} {recipe['sparsity']:.0%} "
            f"| {'streamed' if data.get('streamed') else 'in memory'} "
            f"| {data['forward_seconds']['median']:.2f} "
            f"| {data['compression_seconds']['median']:.2f} "
            f"| {data['ratio']['median']:.2f} ({spread}) | {phases['gram']:.2f} "
            f"| {phases['solve']:.2f} | {_peak(data.get('run', {}))} |"
        )
    return lines


def _peak(run: Result) -> str:
    """Peak memory in GiB: of the device where there is one, else of the process."""
    peak = run.get("peak_device_bytes", run.get("peak_host_bytes"))
    return "" if peak is None else f"{peak / 2**30:.2f}"


def document(results: Sequence[Result]) -> str:
    grams, solves = of(results, "gram"), of(results, "solve")
    devices = sorted({d["environment"]["device"] for d in results if d["device"] == "cuda"})
    state = (
        f"Measured on {', '.join(devices)}." if devices else "**Nothing here ran on a GPU yet.**"
    )
    lines = [INTRODUCTION, "## Goals", "", state, "", *goal_table(results), ""]
    for data in grams:
        lines += [*gram_section(data), ""]
    for data in solves:
        lines += [*solve_section(data), ""]
    for data in of(results, "cosine"):
        lines += [*heading("Cosines", data), *cosine_table(data), *outside(data), ""]
    if of(results, "prune"):
        lines += [*prune_section(results), ""]
    lines += roofline(grams)
    return "\n".join(lines).rstrip() + "\n"


def plot_name(kind: str, data: Result) -> str:
    device = "".join(c if c.isalnum() else "-" for c in data["environment"]["device"].lower())
    return f"{kind}-{device}.svg"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write(folder: Path, results: Sequence[Result]) -> None:
    """`performance.md` and its plots into `folder`."""
    plots = folder / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("gram", plot_gram), ("solve", plot_solve)):
        for data in of(results, kind):
            draw(data, plots / plot_name(kind, data))
    (folder / "performance.md").write_text(document(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    write(arguments.out, load(arguments.results))
    print(f"written: {arguments.out / 'performance.md'}")


if __name__ == "__main__":
    main()

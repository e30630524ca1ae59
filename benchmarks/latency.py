"""Whether a pruned model is as fast as `--budget latency` predicts.

    python benchmarks/latency.py --json FILE            # the demo LLaMA, 30 % and 50 %
    python benchmarks/latency.py --source DIR --calibration TEXT --mode decode --batch 8

Measures the table as `liar bench latency` does (or reads `--latency FILE`), prunes the model to
each sparsity with each allocation, and then times the targeted Sites inside of whole forwards of
the dense and the pruned models, in turns, by the hooks that the table is made with. Predicted is
what the table says of the widths that came out, measured the sum of every Site's median. An
allocation with `+empty` may leave out attention and FFN of layers. With `--evaluate TEXT` there is
the perplexity as well:

    python benchmarks/latency.py --criterion obs --target-signal stream --search-evaluations 64 \
        --allocations uniform,kwon,level-swaps,segments,segments+empty --evaluate TEXT --json FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from liar_ext import Recipe, load
from liar_ext.bench import latency as bench
from liar_ext.bench.measure import machine_state, source_name
from liar_ext.bench.stopwatch import Stopwatch
from liar_ext.bench.workload import unchanged
from liar_ext.checkpoint.load import resolve
from liar_ext.cli.output import print_table
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.engine.api import prune
from liar_ext.engine.inputs import (
    compute_dtype,
    load_calibration,
    load_tokenizer,
    resolve_device,
)
from liar_ext.environment import environment
from liar_ext.evaluation.task import Evaluation
from liar_ext.latency import MODES, LatencyTable, Workload
from liar_ext.models import Site, adapter_for, layout
from liar_ext.models.twin import twin
from liar_ext.planning import dense_config
from liar_ext.report.text import latency, workload

WARM_UP_ROUNDS = 3
# of an allocation under which Sites may lose all their units
EMPTY = "+empty"


def sites_of(model: PreTrainedModel, target: Sequence[str]) -> list[Site]:
    """The targeted Sites of all layers."""
    adapter = adapter_for(model.config)
    count = len(adapter.layer_list(model)[1])
    return [site for i in range(count) for site in adapter.sites_of(model, i, tuple(target))]


def forward_of(model: PreTrainedModel, work: Workload) -> Callable[[], Any]:
    """One forward of the headless model on random tokens, after a prefill where it decodes."""
    adapter = adapter_for(model.config)
    backbone = adapter.backbone(model)[1]
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: int) -> torch.Tensor:
        shape = work.batch, tokens
        ids = torch.randint(backbone.config.vocab_size, shape, generator=generator)
        return ids.to(model.device)

    if work.mode == "prefill":
        ids = drawn(work.seq_len)
        return lambda: backbone(input_ids=ids, **adapter.options)
    cache = DynamicCache(config=backbone.config)
    backbone(input_ids=drawn(work.seq_len), past_key_values=cache, use_cache=True)
    ids = drawn(1)
    return lambda: backbone(input_ids=ids, past_key_values=unchanged(cache), use_cache=True)


@torch.no_grad()
def measured(
    models: Sequence[PreTrainedModel], target: Sequence[str], work: Workload, repeats: int
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Seconds of each targeted Site of each model, forward by forward, and of whole forwards."""
    forwards = [forward_of(model, work) for model in models]
    watches = [Stopwatch(model.device) for model in models]
    places = [sites_of(model, target) for model in models]
    sites: list[list[list[float]]] = [[[] for _ in own] for own in places]
    whole: list[list[float]] = [[] for _ in models]
    order, shuffled = list(range(len(models))), random.Random(0)
    with ExitStack() as stack:
        for watch, own in zip(watches, places, strict=True):
            stack.enter_context(watch.on(own))
        for done in range(WARM_UP_ROUNDS + repeats):
            shuffled.shuffle(order)
            for number in order:
                watch = watches[number]
                begin = watch.now()
                forwards[number]()
                end = watch.now()
                laps = watch.take()
                if done >= WARM_UP_ROUNDS:
                    for place, seconds in laps.items():
                        sites[number][place] += seconds
                    whole[number].append(watch.between(begin, end))
    return sites, whole


def spread(samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """Sums over the lists of their quantiles."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(shares, dim=1).sum(1)
    return dict(zip(("p20", "p50", "p80"), values.tolist(), strict=True))


def predicted(
    model: PreTrainedModel, table: LatencyTable, dense: PreTrainedModel, target: Sequence[str]
) -> float:
    """What the table says of the widths of a model's targeted Sites."""
    # of what is gone there is no Site, and it takes no time
    units = {(site.layer, site.kind): site.units for site in sites_of(model, target)}
    return sum(
        table.budget(was, dense.config).price(units[was.layer, was.kind])
        for was in sites_of(dense, target)
        if (was.layer, was.kind) in units
    )


def perplexity_of(model: PreTrainedModel, source: Path, arguments: argparse.Namespace) -> float:
    """Of the first windows of a text, as the grids evaluate."""
    measure = Evaluation("text", str(arguments.evaluate), 256, 16, 128).on(load_tokenizer(source))
    return float(measure(model)["value"])


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, before = resolve(arguments.source), machine_state()
    file = arguments.latency
    device = resolve_device(arguments.device)
    target = tuple(arguments.target.split(","))
    if file is None:
        file = folder / "latency.json"
        empty = layout.empty_model(layout.config_object(dense_config(source)))
        work = Workload(arguments.mode, arguments.batch, arguments.seq_len)
        found = bench.measure(
            empty,
            work,
            device,
            compute_dtype(arguments.dtype, device),
            target=target,
            repeats=arguments.repeats,
        )
        file.write_text(json.dumps({"source": source_name(arguments.source), **found}))
        print_table(bench.shown({"source": source_name(arguments.source), **found}))
    table = LatencyTable.read(file)
    work = Workload(**table.origin["workload"])
    dense = load(source, dtype=getattr(torch, table.origin["dtype"]), device=device)
    work.check(dense)
    base = Recipe(
        budget="latency",
        latency=str(file),
        target=target,
        calibration=str(arguments.calibration),
        samples=arguments.samples,
        seq_len=arguments.calibration_seq_len,
        round_to=arguments.round_to,
        criterion=arguments.criterion,
        target_signal=arguments.target_signal,
        search_evaluations=arguments.search_evaluations,
    )
    batches = load_calibration(source, dense, base).batches
    cells = [
        replace(
            base,
            sparsity=float(sparsity),
            allocation=allocation.removesuffix(EMPTY),
            empty=allocation.endswith(EMPTY),
        )
        for allocation in arguments.allocations.split(",")
        for sparsity in arguments.sparsities.split(",")
    ]
    models = [dense]
    for cell in cells:
        models.append(twin(dense))
        prune(models[-1], batches, cell)
        print(f"pruned: {cell.allocation} {cell.sparsity:g}", file=sys.stderr, flush=True)
    sites, whole = measured(models, target, work, arguments.repeats)
    rows = []
    for number, model in enumerate(models):
        cell = None if number == 0 else cells[number - 1]
        rows.append(
            {
                "allocation": None if cell is None else cell.allocation + EMPTY * cell.empty,
                "sparsity": 0.0 if cell is None else cell.sparsity,
                "units": {kind: [own[kind] for own in layout.read(model)] for kind in target},
                "predicted_seconds": predicted(model, table, dense, target),
                "measured_seconds": spread(sites[number]),
                "whole_seconds": spread([whole[number]]),
            }
        )
        if arguments.evaluate is not None:
            rows[-1]["perplexity"] = perplexity_of(model, source, arguments)
    return {
        "benchmark": "predicted-latency",
        "source": source_name(arguments.source),
        "date": datetime.date.today().isoformat(),
        "repeats": arguments.repeats,
        "latency": table.to_json(),
        "environment": environment(device),
        "machine": {"before": before, "after": machine_state()},
        "rows": rows,
    }


def shown(result: dict[str, Any]) -> Table:
    """Predicted beside measured."""
    title = f"{result['source']}: {workload(result['latency'])}; all targeted Sites"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for head in ("asked", "predicted", "measured", "p20", "p80", "of dense"):
        table.add_column(head, justify="right")
    evaluated = "perplexity" in result["rows"][0]
    if evaluated:
        table.add_column("perplexity", justify="right")
    dense = result["rows"][0]["measured_seconds"]["p50"]
    for row in result["rows"]:
        own = row["measured_seconds"]
        table.add_row(
            row["allocation"] or "dense",
            f"{row['sparsity']:.0%}",
            latency(row["predicted_seconds"]),
            *(latency(own[name]) for name in ("p50", "p20", "p80")),
            f"{own['p50'] / dense:.1%}",
            *([f"{row['perplexity']:.1f}"] if evaluated else []),
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", default=str(MODEL), help="default the demo LLaMA")
    parser.add_argument("--latency", type=Path, metavar="FILE", help="default: measured now")
    parser.add_argument("--mode", choices=MODES, default="prefill")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--target", default="ffn,heads")
    parser.add_argument("--sparsities", default="0.3,0.5")
    parser.add_argument("--allocations", default="uniform,global,kwon,levels")
    parser.add_argument("--calibration", default=CALIBRATION)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--calibration-seq-len", type=int, default=256)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--target-signal", default="local")
    parser.add_argument("--search-evaluations", type=int, default=64)
    parser.add_argument("--evaluate", type=Path, metavar="TEXT")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        result = run(arguments, Path(temporary))
    print_table(shown(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()

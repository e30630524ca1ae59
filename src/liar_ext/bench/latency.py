"""`liar bench latency`: seconds of one layer's Sites at some numbers of kept units.

The layers are those of the model's own class, with random weights in the shapes that its config
gives: no checkpoint is read. Each of a few copies of a layer has other widths, and weights of its
own; every round runs each of them once, so that between two runs of one the caches have seen the
others, as they see the other layers in a model.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.bench.measure import machine_state, quantiles, source_name
from liar_ext.bench.stopwatch import Stopwatch
from liar_ext.bench.workload import cache_for, calls_of, materialise, unchanged, with_cache
from liar_ext.checkpoint.load import resolve
from liar_ext.cli.output import Watcher, print_table
from liar_ext.cli.prune import add_trace
from liar_ext.engine.calls import LayerCall
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.engine.source import with_trace
from liar_ext.environment import device_name, environment
from liar_ext.errors import InputError, OutOfMemory, is_out_of_memory
from liar_ext.latency import MODES, VERSION, Workload, disturbances, shape_of
from liar_ext.models import Site, adapter_for, check_reads_tokens, layout, text_config
from liar_ext.models.adapter import Adapter, stated_dtype
from liar_ext.planning import dense_config
from liar_ext.recipe import KINDS, Recipe
from liar_ext.report.text import latency, workload

# the first calls pay for threads, libraries and compilers, and a GPU's clock rises
WARM_UP_ROUNDS, WARM_UP_SECONDS = 3, 1.0
# widths that tiles of matrix products fit; smaller for models so small that they would be few
LARGEST_MULTIPLE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or hub id; only its config is read")
    parser.add_argument("--mode", choices=MODES, default="prefill")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="sequences at a time (default 1)"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens of each; with decode those in the cache (default 512, or the model's limit)",
    )
    parser.add_argument(
        "--target", metavar="KINDS", help="ffn, heads, or ffn,heads (default: what the model has)"
    )
    parser.add_argument(
        "--points", type=int, default=12, metavar="N", help="widths of a Site (default 12)"
    )
    parser.add_argument(
        "--repeats", type=int, default=50, metavar="N", help="times of each width (default 50)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.add_argument(
        "--dtype", default="auto", metavar="NAME", help="auto, float32, bfloat16, float16"
    )
    add_trace(parser)


def execute(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print.

    Raises:
        InputError: a model or a workload that cannot be.
        OutOfMemory: with the options to lower.
    """
    for name, least in (("batch", 1), ("seq_len", 1), ("points", 2), ("repeats", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    # checks the names
    wanted = Recipe(
        target=KINDS if arguments.target is None else arguments.target,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    target = None if arguments.target is None else wanted.target
    data = dense_config(resolve(arguments.source, config_only=True))
    if arguments.trace:
        data = with_trace(data, target or ())
    model = layout.empty_model(layout.config_object(data))
    check_reads_tokens(model.config, "liar bench latency")
    device = resolve_device(wanted.device)
    length = arguments.seq_len
    if length is None:
        limit = adapter_for(model.config).max_positions(text_config(model.config))
        length = min(512, limit - (arguments.mode == "decode"))
    work = Workload(arguments.mode, arguments.batch, length)
    with Watcher.of(arguments) as progress:
        try:
            found = measure(
                model,
                work,
                device,
                compute_dtype(wanted.dtype, device),
                target=target,
                points=arguments.points,
                repeats=arguments.repeats,
                progress=progress,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                "out of memory with copies of a layer; lower --batch, --seq-len or --points"
            ) from error
        result = {"source": source_name(arguments.source), **found}
        for text in disturbances(result["tables"]):
            progress.warn(text)
    print_table(shown(result))
    return result


def measure(
    model: PreTrainedModel,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    target: Sequence[str] | None = None,
    points: int = 12,
    repeats: int = 50,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The table, as JSON data.

    Args:
        model: on `meta`, dense; parts of it are made real and changed.
        dtype: of weights and hidden states; None is the config's.
        target: kinds of Site; None is all that the model has.
    Raises:
        InputError: the model cannot do that work, or has no Site of a kind.
    """
    progress = progress or Silent()
    adapter = adapter_for(model.config)
    work.check(model)
    dtype = dtype or stated_dtype(model.config)
    before = machine_state()
    shapes = _shapes(model, _targets(adapter, target))
    tables: dict[tuple[Any, ...], dict[str, Any]] = {}
    layers = []
    with torch.no_grad():
        hidden, calls = calls_of(model, work, device, dtype)
        progress.begin(len(shapes) * repeats, "measuring")
        for index, own in shapes.items():
            chosen = widths(own, points)
            variants = [
                _variant(model, index, kept, hidden, calls[index], work, device, dtype)
                for kept in chosen
            ]
            times, whole = _rounds(variants, hidden, device, repeats, progress)
            for kind, shape in own.items():
                units = sorted({kept[kind] for kept in chosen})
                samples = [
                    [
                        t
                        for kept, found in zip(chosen, times, strict=True)
                        if kept[kind] == count
                        for t in found[kind]
                    ]
                    for count in units
                ]
                seconds = _quantiles(samples)
                key = tuple(shape.values())
                tables.setdefault(key, {"shape": shape, "units": units, "seconds": seconds})
            layers.append({"layer": index, "seconds": quantiles(whole)})
            del variants
    return {
        "benchmark": "latency",
        "version": VERSION,
        "model_type": adapter.model_type,
        "attention": model.config._attn_implementation,
        "device": device_name(device),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "workload": asdict(work),
        "repeats": repeats,
        "date": datetime.date.today().isoformat(),
        "environment": environment(device),
        "machine": {"before": before, "after": machine_state()},
        "tables": list(tables.values()),
        "dense_layers": layers,
    }


def _targets(adapter: Adapter, target: Sequence[str] | None) -> tuple[str, ...]:
    kinds = tuple(spec.kind for spec in adapter.sites)
    for kind in target or ():
        if kind not in kinds:
            raise InputError(f"--target {kind}: this model has none; it has {', '.join(kinds)}")
    return kinds if target is None else tuple(target)


def _shapes(model: PreTrainedModel, target: Sequence[str]) -> dict[int, dict[str, dict[str, Any]]]:
    """The shapes of each kind in the layers that differ, by the first layer of each."""
    adapter = adapter_for(model.config)
    found: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {}
    for index in range(len(adapter.layer_list(model)[1])):
        sites = adapter.sites_of(model, index, tuple(target))
        own: dict[str, dict[str, Any]] = {site.kind: shape_of(site, model.config) for site in sites}
        found.setdefault(repr(own), (index, own))
    return dict(found.values())


def widths(shapes: dict[str, dict[str, Any]], points: int) -> list[dict[str, int]]:
    """Kept units of each kind, copy by copy: the first is dense, and each kind has its widths.

    The kind with fewer widths has them several times.
    """
    grids = {kind: grid(kind, shape["units"], points)[::-1] for kind, shape in shapes.items()}
    most = max(map(len, grids.values()))
    return [{kind: own[i % len(own)] for kind, own in grids.items()} for i in range(most)]


def grid(kind: str, units: int, points: int) -> list[int]:
    """About `points` widths from 1 to all units; of an FFN, multiples of a power of two between."""
    if units <= points:
        return list(range(1, units + 1))
    step = 1
    while kind == "ffn" and 2 * step <= min(LARGEST_MULTIPLE, units // (2 * points)):
        step *= 2
    even = (round(units * place / (points - 1) / step) * step for place in range(1, points - 1))
    return sorted({1, units, *(width for width in even if 1 <= width < units)})


def _variant(
    model: PreTrainedModel,
    index: int,
    kept: dict[str, int],
    hidden: Tensor,
    call: LayerCall,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Callable[[Tensor], Any], list[Site]]:
    """A copy of a layer with that many units, and its Sites."""
    adapter = adapter_for(model.config)
    layer = copy.deepcopy(adapter.layer_list(model)[1][index])
    sites = []
    for whole in adapter.sites_of(model, index, tuple(kept)):
        site = Site(whole.spec, index, layer, whole.head_dim, whole.name)
        site.shrink(torch.arange(kept[site.kind]))
        sites.append(site)
    materialise(layer, device, dtype)
    if work.mode == "decode":
        cache = cache_for(model, index, layer, hidden, call, work)

        def step(hidden: Tensor) -> Any:
            own = with_cache(call, unchanged(cache))
            return layer(hidden, *own.args, **own.kwargs)

        return step, sites
    return lambda hidden: layer(hidden, *call.args, **call.kwargs), sites


def _rounds(
    variants: Sequence[tuple[Callable[[Tensor], Any], list[Site]]],
    hidden: Tensor,
    device: torch.device,
    repeats: int,
    progress: Progress,
) -> tuple[list[dict[str, list[float]]], list[float]]:
    """Seconds of each Site of each variant, and of all of the first one, which is dense."""
    times: list[dict[str, list[float]]] = [{s.kind: [] for s in sites} for _, sites in variants]
    whole: list[float] = []
    order, shuffled = list(range(len(variants))), random.Random(0)
    started, done, warm = time.perf_counter(), 0, False
    watches = [Stopwatch(device) for _ in variants]
    with ExitStack() as stack:
        for watch, (_, sites) in zip(watches, variants, strict=True):
            stack.enter_context(watch.on(sites))
        while len(whole) < repeats:
            # nobody is always after the same one
            shuffled.shuffle(order)
            for number in order:
                begin = watches[number].now()
                variants[number][0](hidden)
                if number == 0:
                    ends = begin, watches[0].now()
            # a GPU is waited for once in a round: it has work all the time, as in a model
            laps = [watch.take() for watch in watches]
            if warm:
                for own, found, (_, sites) in zip(times, laps, variants, strict=True):
                    for place, site in enumerate(sites):
                        own[site.kind] += found[place]
                whole.append(watches[0].between(*ends))
                progress.layer(len(whole) - 1)
            done += 1
            warm = done >= WARM_UP_ROUNDS and time.perf_counter() - started >= WARM_UP_SECONDS
    return times, whole


def _quantiles(samples: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """p20, p50 and p80 of each list."""
    rows = [quantiles(own) for own in samples]
    return {name: [row[name] for row in rows] for name in ("p20", "p50", "p80")}


def shown(result: dict[str, Any]) -> Table:
    """A row for each width, dense first."""
    table = Table(
        title=f"{result['source']}: {workload(result)}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("", "units", "median", "p20", "p80", "of dense"):
        table.add_column(name, justify="right" if name else "left")
    for own in result["tables"]:
        shape = own["shape"]
        title = shape["kind"] + (f" ({shape['attention']})" if shape["attention"] else "")
        rows = list(zip(own["units"], *own["seconds"].values(), strict=True))[::-1]
        for units, p20, p50, p80 in rows:
            share = p50 / rows[0][2]
            table.add_row(
                title, f"{units:,}", latency(p50), latency(p20), latency(p80), f"{share:.1%}"
            )
            title = ""
        table.add_section()
    for layer in result["dense_layers"]:
        spread = layer["seconds"]
        table.add_row(
            f"dense layer {layer['layer']}",
            "",
            *(latency(spread[p]) for p in ("p50", "p20", "p80")),
        )
    return table

"""`liar plan`: what a compression will give and cost, from shapes alone.

The model is built on `meta` and shrunk there by the code that shrinks real ones, so parameters,
bytes and the loader are those of the result. Costs are counted, not measured, except for short
runs of the kernels that turn FLOPs into seconds. No weight is read: safetensors headers give the
dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.checkpoint.dtypes import DTYPE_BYTES
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import INDEX, SINGLE, CheckpointReader, read_json, tied_names
from liar_ext.choice_costs import choice_plan
from liar_ext.costs import (
    SitePlan,
    Tokens,
    compression_flops,
    head_flops,
    held_beside,
    held_bytes,
    layer_flops,
    producer_rows,
)
from liar_ext.engine.budgets import budgets
from liar_ext.engine.compression import check_model
from liar_ext.engine.driver import Driver
from liar_ext.engine.execution import Execution
from liar_ext.engine.inputs import compute_dtype, resolve_device
from liar_ext.engine.source import with_trace
from liar_ext.engine.store import InMemory
from liar_ext.environment import device_name
from liar_ext.errors import InputError
from liar_ext.gradient_memory import learning_graph
from liar_ext.latency import LatencyTable
from liar_ext.models import adapter_for, layout
from liar_ext.models.adapter import Adapter, stated_dtype
from liar_ext.needs import needs, resident_bytes, weights_of
from liar_ext.planning_depth import Shortened, dense_path, fitted, shortened
from liar_ext.planning_loader import loader_of
from liar_ext.planning_tokens import features_bytes, tokens_needed_by, tokens_of
from liar_ext.prior_costs import prior_plan
from liar_ext.rates import measure
from liar_ext.recipe import Recipe
from liar_ext.search_costs import search_sizes
from liar_ext.survey import learning_flops, needs_tokens, reads_of, survey_costs

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = tuple(NAMES.values())


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    execution: Execution | None = None,
    ranks: int = 1,
    out: Path | None = None,
    device_memory: int | None = None,
    rates: Mapping[str, float] | None = None,
    trace: bool = False,
) -> dict[str, Any]:
    """Shapes, sizes, costs and the loader of one compression.

    Args:
        source: a folder with at least `config.json`, or a hub id.
        execution: as `compress` will get it.
        ranks: of how many processes; memory is then that of one of them.
        out: the folder to be made, whose disk has to have room; None is the working directory.
        device_memory: bytes of a GPU that need not be here; times are then not predicted.
        trace: as `compress` will get it.
        rates: FLOP/s of `forward`, `gram`, `solve` and `residual`, instead of measuring them.
    Returns:
        JSON-able data: `sites`, `parameters`, `bytes`, `sparsity`, `latency` (of a budget in
        seconds), `flops_per_token`, `calibration`, `flops`, `memory` (bytes, parts of the phase
        that needs most), `phases`, `hidden_states`, `disk`, `seconds`, `loader`, `notes`. `exact`
        is False where the allocation decides only after it has seen the tokens. `depth` is None
        where no layer goes; its `dropped` are None where a measurement will tell.
    Raises:
        InputError: as `liar prune` would, before it computes anything.
    """
    execution = execution or Execution()
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: must be at least 1")
    folder = resolve(source, config_only=True)
    dense = with_trace(dense_config(folder), recipe.target if trace else None)
    hypothetical = device_memory is not None
    device = torch.device("cuda") if hypothetical else resolve_device(recipe.device)
    model = whole = layout.empty_model(layout.config_object(dense))
    adapter = adapter_for(model.config)
    notes: list[str] = []
    stored, bytes_before = _stored(folder, model, notes)
    tokens = tokens_of(folder, model, recipe, bytes_before is not None, notes)
    dtype = compute_dtype(recipe.dtype, device) or _dtype_of(stored)
    if bytes_before is None:
        bytes_before = _written(model, adapter, stored, "auto")
    weights = weights_of(model, adapter, stored, dtype)
    parameters_before = _parameters(whole)
    all_layers = layer_flops(whole, adapter, tokens.seq_len, tokens.shares)
    held = held_bytes(whole, adapter, recipe, tokens.positions, weights.item, tokens.seq_len)
    choice = choice_plan(whole, adapter, recipe, tokens, ranks, weights.item)
    cut: Shortened | None = None
    asked = recipe
    if recipe.shortens:
        cut = shortened(dense, whole, adapter, stored, recipe, notes)
        dense, model, stored = cut.config, cut.model, cut.stored
        if not recipe.narrows:
            # no width is chosen: neither has a say
            recipe = replace(recipe, allocation=Recipe.allocation, criterion=Recipe.criterion)
    left_out = None if cut is None else cut.left_out
    gaps = {} if left_out is None else left_out.gaps
    # checks the recipe against the model, and knows which biases are added
    store = InMemory(model)
    driver = check_model(store, recipe, left_out)
    costs = budgets(store, recipe, tokens.seq_len)
    if (said := driver.check(costs, tokens.samples)) is not None:
        notes.append(said)
    targeted = sum(budget.price(budget.units) for budget in costs.values())
    widths = layout.read(model)
    by_layer = layer_flops(model, adapter, tokens.seq_len, tokens.shares)
    units = sum(budget.units for budget in costs.values())
    prior = prior_plan(model, adapter, recipe, tokens, ranks, weights.item, units)
    beside = {"gradients": 0, "learning": 0} | (prior.flops if prior is not None else {})
    beside["learning"] += learning_flops(model, adapter, recipe, by_layer, tokens, driver.targets)
    graph = learning_graph(model, adapter, recipe, driver.targets.start)

    survey_flops, survey_bytes = survey_costs(model, adapter, recipe, driver.targets)
    tied = bool(tied_names(model))
    search = search_sizes(model, adapter, recipe, tokens, costs, tied, ranks)
    also = fitted(model, adapter, driver, gaps, tokens.seq_len)
    sites = _shrink(model, adapter, recipe, driver, costs, notes, gaps, tokens)
    order: list[str] = [spec.kind for spec in adapter.sites]
    every = sorted([*sites, *also], key=lambda site: (site.layer, order.index(site.kind)))
    left = sum(costs[s.layer, s.kind].price(s.units_after) for s in sites)
    table = None if recipe.latency is None else LatencyTable.read(recipe.latency)
    if table is not None:
        notes += [f"warning: {text}" for text in table.warnings(recipe.target, recipe.round_to)]
    bytes_after = _written(model, adapter, stored, recipe.dtype)
    found = needs(
        weights,
        every,
        tokens,
        recipe,
        execution,
        process=resident_bytes() + features_bytes(model, adapter, tokens),
        written=_layer_written(model, adapter, stored, recipe.dtype),
        output=bytes_after,
        held=held,
        survey_bytes=survey_bytes,
        prior=prior,
        learning=graph,
        search=search,
        choice=choice,
        ranks=ranks,
        out=out,
        device=device,
        device_memory=device_memory,
    )
    reads, again = reads_of(recipe), not found.pop("library")
    stop, dense_flops = dense_path(by_layer, all_layers, driver, left_out)
    # first layers of stacks are run once more, for what they hand on
    starts = adapter.chain(model).starts if adapter.hands_on else []
    entering = sum(by_layer[start] for start in starts)
    flops = compression_flops(
        every,
        tokens,
        sum(by_layer[:stop]) + entering,
        recipe,
        passes=2 if again and needs_tokens(recipe) else 1,
        grams=2 if again and reads == "moments" else 1,
        survey=survey_flops,
        beside=dense_flops,
    )
    flops |= {**beside, "search": 0, "choice": 0 if choice is None else choice.flops}
    if search is not None:
        flops |= {name: flops[name] + more for name, more in search.flops.items()}
        notes.append(search.reads(recipe))
    return {
        "source": str(source),
        "model_type": adapter.model_type,
        "layers": len(widths),
        "depth": None if cut is None else cut.to_json(),
        "recipe": asked.to_json(),
        "ranks": ranks,
        "exact": reads is None and search is None,
        "sites": [asdict(site) for site in sites],
        "parameters": {"before": parameters_before, "after": _parameters(model)},
        "bytes": {"before": bytes_before, "after": bytes_after},
        "sparsity": {"asked": recipe.sparsity, "achieved": (targeted - left) / (targeted or 1)},
        "latency": table and {"before": targeted, "after": left, **table.to_json()},
        "flops_per_token": {
            "context": tokens.seq_len,
            "before": sum(all_layers) + head_flops(whole, tokens.shares),
            "after": sum(layer_flops(model, adapter, tokens.seq_len, tokens.shares))
            + head_flops(model, tokens.shares),
        },
        "calibration": asdict(tokens) | tokens_needed_by(every, tokens, recipe),
        "flops": flops,
        **found,
        "seconds": _seconds(flops, None if hypothetical else rates or measure(device, dtype))
        | {"device": "a GPU that is not here" if hypothetical else device_name(device)},
        "loader": loader_of(model, adapter, recipe, dense, widths, driver.added_biases),
        "notes": notes,
    }


def pruned_config(dense: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The `config.json` of what a recipe would make of a dense one, from shapes alone.

    Args:
        dense: see `dense_config`; recipe: with an allocation that needs to know nothing first.
    Raises:
        InputError: as `liar prune` would, before it computes anything.
    """
    model = layout.empty_model(layout.config_object(dense))
    adapter, store = adapter_for(model.config), InMemory(model)
    driver, before = check_model(store, recipe), layout.read(model)
    costs = budgets(store, recipe, 1)
    driver.check(costs, recipe.samples)
    _shrink(model, adapter, recipe, driver, costs, [], {}, None)
    values = layout.equal_values(model, before)
    return layout.describe(dense, adapter, layout.read(model), values, driver.added_biases)


def _seconds(flops: Mapping[str, int], rates: Mapping[str, float] | None) -> dict[str, Any]:
    """Of one process; None without rates."""
    if rates is None:
        return {**dict.fromkeys((*flops, "total")), "rates": None}
    # of the others all are matmuls in the compute dtype, as a forward pass is
    found = {p: flops[p] / rates.get(p, rates["forward"]) for p in flops}
    return {**found, "total": sum(found.values()), "rates": dict(rates)}


def dense_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model that can be pruned; InputError where it is no such thing."""
    dense = read_json(folder / "config.json")
    if "model_type" not in dense:
        raise InputError(f"{folder / 'config.json'}: no model_type; not a transformers model")
    if layout.KEY in dense:
        raise InputError(
            f"{folder}: pruned already with per-layer widths; start from the dense one"
        )
    return dense


def _stored(
    folder: Path, model: PreTrainedModel, notes: list[str]
) -> tuple[dict[str, str], int | None]:
    """The dtype of each tensor as safetensors names it, and the bytes of the files.

    Without weights, the dtype is the config's and the bytes are None.
    """
    if _has_weights(folder):
        reader = CheckpointReader(folder)
        left_over = reader.bind(model)
        if left_over:
            notes.append(f"{len(left_over)} tensors are no part of the model, first {left_over[0]}")
        return reader.dtypes(), reader.bytes()
    dtype = stated_dtype(model.config)
    notes.append(f"no safetensors weights in {folder}: bytes assume the config's dtype, {dtype}")
    tied = tied_names(model)
    return {name: NAMES[dtype] for name in model.state_dict() if name not in tied}, None


def _has_weights(folder: Path) -> bool:
    if not (folder / INDEX).exists():
        return (folder / SINGLE).exists()
    weight_map = read_json(folder / INDEX).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    # with some of the files, the download is broken and the reader says so
    return not files or any((folder / file).exists() for file in files)


def _dtype_of(stored: Mapping[str, str]) -> torch.dtype:
    floating = [name for name in stored.values() if name in FLOATING]
    return {name: dtype for dtype, name in NAMES.items()}[max(set(floating), key=floating.count)]


def _shrink(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    driver: Driver,
    known: Mapping[tuple[int, str], Budget],
    notes: list[str],
    gaps: Mapping[int, range],
    tokens: Tokens | None,
) -> list[SitePlan]:
    """Shrink the model on `meta` as the driver would, biases included.

    Args:
        tokens: of the calibration; None where only widths are wanted.
    """
    layers = adapter.chain(model)
    allocation = ALLOCATIONS[recipe.allocation]
    reads = reads_of(recipe)
    if reads is not None or allocation.search is not None:
        when = "a forward pass" if allocation.search is None else "it has tried whole models"
        if reads == "weights" and allocation.search is None:
            when = "it has gone through the layers, without a forward pass of its own"
        notes.append(
            f"--allocation {recipe.allocation} decides after {when}: equal widths are assumed, so "
            "sizes and costs are estimates"
        )
        allocation = ALLOCATIONS["uniform"]
    kept = (
        allocation.widths(list(known.values()), recipe.sparsity, recipe.round_to) if known else []
    )
    sites = []
    for (index, kind), units in zip(known, kept, strict=True):
        site = adapter.sites_of(model, index, (kind,))[0]
        before, columns, each = site.units, site.columns, site.columns_per_unit
        rows, outputs = producer_rows(site), site.weight().shape[0]
        across = index in gaps and kind == adapter.sites[-1].kind
        beside = 0 if tokens is None else held_beside(model, site, tokens.seq_len)
        site.shrink(torch.arange(units))
        sites.append(
            SitePlan(
                *(index, kind, site.name, before, units, columns, units * each, outputs, rows),
                across=across,
                beside=beside,
                stack=layers.stack(index),
            )
        )
    for index in range(len(adapter.chain(model))):
        for site in adapter.sites_of(model, index, tuple(driver.added_biases)):
            site.add_biases(filler=site.spec.bias_flag is not None)
    return sites


def _parameters(model: PreTrainedModel) -> int:
    tied = tied_names(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def _written(
    model: PreTrainedModel, adapter: Adapter, stored: Mapping[str, str], dtype: str
) -> int:
    """Bytes of the result's weight files; `dtype` as in the recipe."""
    return sum(_written_bytes(model, adapter, stored, dtype).values())


def _layer_written(
    model: PreTrainedModel, adapter: Adapter, stored: Mapping[str, str], dtype: str
) -> int:
    """Bytes of the largest layer of the result."""
    layers = adapter.chain(model)
    found: dict[int, int] = {}
    for name, size in _written_bytes(model, adapter, stored, dtype).items():
        if (layer := layers.layer_of(name)) is not None:
            found[layer] = found.get(layer, 0) + size
    return max(found.values())


def _written_bytes(
    model: PreTrainedModel, adapter: Adapter, stored: Mapping[str, str], dtype: str
) -> dict[str, int]:
    """Of each tensor of the result."""
    wanted = "" if dtype == "auto" else NAMES[getattr(torch, dtype)]
    layers = adapter.chain(model)
    sizes = {}
    for name, tensor in model.state_dict().items():
        # a bias that was added is written like its weight
        found = stored.get(name) or stored.get(f"{name.removesuffix('bias')}weight")
        if found is not None and (name in stored or layers.layer_of(name) is not None):
            kept = wanted if wanted and found in FLOATING else found
            sizes[name] = tensor.numel() * DTYPE_BYTES[kept]
    return sizes

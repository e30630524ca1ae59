"""`liar plan`: what a compression will give and cost, from shapes alone.

The model is built on `meta` and shrunk there by the code that shrinks real ones, so parameters,
bytes and the loader are those of the result. Costs are counted, not measured, except for a short
matmul that turns FLOPs into seconds. No weight is read: safetensors headers give the dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from liar_ext.allocation import ALLOCATIONS
from liar_ext.calibration.batches import RECOMMENDED_TOKENS_PER_COLUMN, check_enough
from liar_ext.calibration.sources import refuse_missing_path
from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import (
    DTYPE_BYTES,
    INDEX,
    SINGLE,
    CheckpointReader,
    read_json,
    tied_names,
)
from liar_ext.checkpoint.writer import SHARD_BYTES
from liar_ext.costs import (
    SitePlan,
    Tokens,
    activation_bytes,
    compression_flops,
    head_flops,
    layer_flops,
    measure,
    producer_rows,
    weight_bytes,
)
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver, budgets
from liar_ext.engine.inputs import compute_dtype, load_calibration, resolve_device
from liar_ext.engine.progress import Silent
from liar_ext.engine.store import InMemory
from liar_ext.environment import device_name
from liar_ext.errors import InputError
from liar_ext.models import adapter_for, layout, text_config
from liar_ext.models.adapter import Adapter
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report.card import auto_class
from liar_ext.report.text import change, count, duration, parameters, percent, size

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = tuple(NAMES.values())


def plan(
    source: str | Path, recipe: Recipe, *, rates: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Shapes, sizes, costs and the loader of one compression.

    Args:
        source: a folder with at least `config.json`, or a hub id.
        rates: FLOP/s of `forward`, `gram` and `solve`, instead of measuring them (below 1 s).
    Returns:
        JSON-able data: `sites`, `parameters`, `bytes`, `sparsity`, `flops_per_token`,
        `calibration`, `flops`, `memory` (bytes), `seconds`, `loader`, `notes`. `exact` is False
        where the allocation decides only after it has seen the tokens.
    Raises:
        InputError: as `liar prune` would, before it computes anything.
    """
    folder = resolve(source, config_only=True)
    dense = _dense_config(folder)
    device = resolve_device(recipe.device)
    model = layout.empty_model(layout.config_object(dense))
    adapter = adapter_for(model.config)
    notes: list[str] = []
    stored, bytes_before = _stored(folder, model, notes)
    tokens = _tokens(folder, model, recipe, bytes_before is not None, notes)
    # checks the recipe against the model, and knows which biases are added
    host = torch.device("cpu")
    driver = Driver(InMemory(model), (), recipe, host, Silent(), Clock(host))
    costs = budgets(driver.store, recipe)
    targeted = sum(budget.units * budget.cost for budget in costs.values())
    widths, parameters_before = layout.read(model), _parameters(model)
    by_layer = layer_flops(model, adapter, tokens.seq_len)
    dtype = compute_dtype(recipe.dtype, device) or _dtype_of(stored)
    memory = weight_bytes(model, adapter, dtype.itemsize)
    if bytes_before is None:
        bytes_before = _written(model, adapter, stored, "auto")

    sites = _shrink(model, adapter, recipe, driver, notes)
    removed = sum((s.units_before - s.units_after) * costs[s.layer, s.kind].cost for s in sites)
    bytes_after = _written(model, adapter, stored, recipe.dtype)
    hidden = text_config(model.config).hidden_size
    memory |= activation_bytes(sites, tokens, hidden, dtype.itemsize, recipe)
    # safetensors copies a shard once more to write it
    memory["write_buffer"] = 2 * min(bytes_after, SHARD_BYTES)
    beside = memory["write_buffer"] if device.type == "cuda" else 0
    memory["peak"] = sum(memory.values()) - beside
    flops = compression_flops(sites, tokens, sum(by_layer[: driver.targets.stop]), recipe)
    rates = rates or measure(device, dtype)
    seconds = {
        "forward": flops["forward"] / rates["forward"],
        "gram": flops["gram"] / rates["gram"],
        "solve": (flops["solve"] + flops["residual"]) / rates["solve"],
    }
    return {
        "source": str(source),
        "model_type": adapter.model_type,
        "layers": len(widths),
        "recipe": recipe.to_json(),
        "exact": not ALLOCATIONS[recipe.allocation].needs_scores,
        "sites": [asdict(site) for site in sites],
        "parameters": {"before": parameters_before, "after": _parameters(model)},
        "bytes": {"before": bytes_before, "after": bytes_after},
        "sparsity": {"asked": recipe.sparsity, "achieved": removed / targeted},
        "flops_per_token": {
            "context": tokens.seq_len,
            "before": sum(by_layer) + head_flops(model),
            "after": sum(layer_flops(model, adapter, tokens.seq_len)) + head_flops(model),
        },
        "calibration": asdict(tokens) | _needed(sites, tokens, recipe),
        "flops": flops,
        "memory": memory,
        "seconds": {
            **seconds,
            "total": sum(seconds.values()),
            "device": device_name(device),
            "rates": dict(rates),
        },
        "loader": _loader(model, adapter, recipe, dense, widths, driver.added_biases),
        "notes": notes,
    }


def _dense_config(folder: Path) -> dict[str, Any]:
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
    dtype = getattr(text_config(model.config), "dtype", None) or torch.float32
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


def _tokens(
    folder: Path, model: PreTrainedModel, recipe: Recipe, complete: bool, notes: list[str]
) -> Tokens:
    """Counted from a local calibration file where there is one, else what the recipe allows."""
    if recipe.calibration is not None:
        refuse_missing_path(recipe.calibration)
    if complete and recipe.calibration is not None and Path(recipe.calibration).is_file():
        found = load_calibration(folder, model, recipe)
        shapes = [batch.input_ids.shape for batch in found.batches]
        positions = sum(shape.numel() for shape in shapes)
        longest = max(shape[1] for shape in shapes)
        return Tokens(found.tokens, positions, found.samples, longest, counted=True)
    adapter = adapter_for(model.config)
    length = min(recipe.seq_len, adapter.max_positions(text_config(model.config)))
    total = recipe.samples * length
    short = "" if adapter.decoder else "; an encoder's texts are mostly much shorter"
    notes.append(
        f"calibration not counted: {recipe.samples} samples of {length} tokens assumed{short}"
    )
    return Tokens(total, total, recipe.samples, length, counted=False)


def _needed(sites: list[SitePlan], tokens: Tokens, recipe: Recipe) -> dict[str, Any]:
    """Tokens that the widest Site needs, and what is wrong with those there are."""
    if not RECONSTRUCTIONS[recipe.reconstruct].solves:
        return {"minimum": 1, "recommended": 1, "problem": None}
    width = max(site.columns_before for site in sites)
    try:
        problem = check_enough(tokens.tokens, width)
    except InputError as error:
        problem = str(error)
    recommended = RECOMMENDED_TOKENS_PER_COLUMN * width
    return {"minimum": width, "recommended": recommended, "problem": problem}


def _shrink(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, driver: Driver, notes: list[str]
) -> list[SitePlan]:
    """Shrink the model on `meta` as the driver would, biases included."""
    allocation = ALLOCATIONS[recipe.allocation]
    if allocation.needs_scores:
        notes.append(
            f"--allocation {recipe.allocation} decides after a forward pass: equal widths are "
            "assumed, so sizes and costs are estimates"
        )
        allocation = ALLOCATIONS["uniform"]
    known = budgets(driver.store, recipe)
    kept = allocation.widths(list(known.values()), recipe.sparsity, recipe.round_to)
    sites = []
    for (index, kind), units in zip(known, kept, strict=True):
        site = adapter.sites_of(model, index, (kind,))[0]
        before, columns = site.units, site.columns
        rows = producer_rows(site)
        site.shrink(torch.arange(units))
        outputs = site.weight().shape[0]
        sites.append(
            SitePlan(index, kind, site.name, before, units, columns, site.columns, outputs, rows)
        )
    for index in range(len(adapter.layer_list(model)[1])):
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
    wanted = "" if dtype == "auto" else NAMES[getattr(torch, dtype)]
    layers = f"{adapter.layer_list(model)[0]}."
    total = 0
    for name, tensor in model.state_dict().items():
        # a bias that was added is written like its weight
        found = stored.get(name) or stored.get(f"{name.removesuffix('bias')}weight")
        if found is not None and (name in stored or name.startswith(layers)):
            kept = wanted if wanted and found in FLOATING else found
            total += tensor.numel() * DTYPE_BYTES[kept]
    return total


def _loader(
    model: PreTrainedModel,
    adapter: Adapter,
    recipe: Recipe,
    dense: dict[str, Any],
    before: list[dict[str, int]],
    added_biases: list[str],
) -> dict[str, Any]:
    """Who will load the result: `stock`, the layout, the class or the reason why not."""
    after = layout.read(model)
    pairs = list(zip(after, before, strict=True))
    changed = [s for s in adapter.sites if any(a[s.kind] != b[s.kind] for a, b in pairs)]
    unstated = [s.kind for s in changed if s.config_fields is None]
    unflagged = [s.kind for s in adapter.sites if s.kind in added_biases and s.bias_flag is None]
    family = f"a {adapter.model_type} config"
    reason = None
    if not ALLOCATIONS[recipe.allocation].equal:
        reason = f"--allocation {recipe.allocation} gives every layer its own width"
    elif any(len({widths[s.kind] for widths in after}) > 1 for s in changed):
        reason = "the widths differ between layers"
    elif unstated:
        reason = f"{family} cannot state fewer {' or '.join(unstated)}"
    elif unflagged:
        reason = f"{family} cannot state the biases added to {' and '.join(unflagged)}"
    values = None if reason else layout.equal_values(model, before)
    config = layout.describe(dense, adapter, after, values, added_biases)
    name = layout.loader_of(config, dense)
    stock = name.startswith("stock")
    if not stock and reason is None:
        reason = f"{family} rejects these widths"
    return {
        "stock": stock,
        "layout": name,
        "with": f"transformers.{auto_class(config)}" if stock else "liar_ext.load",
        "why_not_stock": reason,
    }


def render(plan: Mapping[str, Any]) -> RenderableType:
    """A plan as rich tables."""
    about = "" if plan["exact"] else "about "
    result = _table("before", "after", "change")
    for label, key, show in (
        ("parameters", "parameters", parameters),
        ("weight files", "bytes", size),
        ("FLOPs per token", "flops_per_token", count),
    ):
        before, after = plan[key]["before"], plan[key]["after"]
        result.add_row(label, show(before), about + show(after), change(before, after))
    for kind in dict.fromkeys(site["kind"] for site in plan["sites"]):
        own = [site for site in plan["sites"] if site["kind"] == kind]
        units = [[site[f"units_{when}"] for site in own] for when in ("before", "after")]
        result.add_row(
            f"{kind} units in {len(own)} layers",
            _listed(units[0]),
            about + _listed(units[1]),
            change(sum(units[0]), sum(units[1])),
        )
    flops, seconds = plan["flops"], plan["seconds"]
    cost = _table("FLOPs", "time")
    cost.add_row("forward", count(flops["forward"]), duration(seconds["forward"]))
    cost.add_row("Gram", count(flops["gram"]), duration(seconds["gram"]))
    solving = flops["solve"] + flops["residual"]
    cost.add_row("solve and residual", count(solving), duration(seconds["solve"]))
    cost.add_row("together, about", "", duration(seconds["total"]))
    memory = _table("memory")
    for key, value in plan["memory"].items():
        memory.add_row(key.replace("_", " "), size(value))
    return Group(
        _heading(f"{plan['source']} after pruning"),
        result,
        _heading("The compression itself"),
        cost,
        _heading("Held in memory at once"),
        memory,
        Text("\n".join(_lines(plan, about))),
    )


def _lines(plan: Mapping[str, Any], about: str) -> list[str]:
    data, loader, asked = plan["calibration"], plan["loader"], plan["sparsity"]["asked"]
    why = f", because {loader['why_not_stock']}" if loader["why_not_stock"] else ""
    return [
        f"sparsity: {percent(asked)} asked, {about}{percent(plan['sparsity']['achieved'])} reached",
        f"loads with {loader['with']}{why}",
        f"calibration: {data['tokens']:,} tokens; {data['minimum']:,} needed, "
        f"{data['recommended']:,} recommended",
        f"time: FLOPs at the matmul rate of {plan['seconds']['device']} measured just now; "
        "reading, writing and memory-bound work come on top",
        *([f"warning: {data['problem']}"] if data["problem"] else []),
        *plan["notes"],
    ]


def _table(*heads: str) -> Table:
    table = Table("")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _listed(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"

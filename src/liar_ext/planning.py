"""`liar plan`: what a compression will give and cost, from shapes alone.

The model is built on `meta` and shrunk there by the code that shrinks real ones, so parameters,
bytes and the loader are those of the result. Costs are counted, not measured, except for a short
matmul that turns FLOPs into seconds. No weight is read: safetensors headers give the dtypes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from liar_ext.allocation import ALLOCATIONS
from liar_ext.calibration.batches import RECOMMENDED_TOKENS_PER_COLUMN, check_enough
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
from liar_ext.engine.api import compute_dtype, load_calibration, resolve_device
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver, budgets
from liar_ext.engine.progress import Silent
from liar_ext.engine.store import InMemory
from liar_ext.environment import device_name
from liar_ext.errors import InputError
from liar_ext.models import Site, adapter_for, layout, linear, text_config
from liar_ext.models.adapter import Adapter
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report.card import auto_class
from liar_ext.report.text import change, count, duration, percent, size

MEASURE_SECONDS = 0.3
MEASURE_SIZE = {"cpu": 512, "cuda": 8192}
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = tuple(NAMES.values())


@dataclass(frozen=True)
class SitePlan:
    """One Site: as in the report, and the rows of its consumer and of its producers."""

    layer: int
    kind: str
    name: str
    units_before: int
    units_after: int
    columns_before: int
    columns_after: int
    outputs: int
    producer_rows: int


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens: valid ones, positions with padding, samples, longest sample."""

    tokens: int
    positions: int
    samples: int
    seq_len: int
    counted: bool


def plan(source: str | Path, recipe: Recipe, *, rates: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Shapes, sizes, costs and the loader of one compression.

    Args:
        source: a folder with at least `config.json`, or a hub id.
        rates: FLOP/s of `forward`, `gram` and `solve`, instead of measuring them (below 1 s).
    Returns:
        JSON-able data: `sites`, `parameters`, `bytes`, `sparsity`, `flops_per_token`,
        `calibration`, `flops`, `memory` (bytes), `seconds`, `loader`, `notes`.
    Raises:
        InputError: as `liar prune` would, before it computes anything.
    """
    folder = _folder(source)
    dense = read_json(folder / "config.json")
    if layout.KEY in dense:
        raise InputError(f"{folder}: pruned already with per-layer widths; start from the dense one")
    if "model_type" not in dense:
        raise InputError(f"{folder / 'config.json'}: no model_type; not a transformers model")
    device = resolve_device(recipe.device)
    model = layout.empty_model(layout.config_object(dense))
    adapter = adapter_for(model.config)
    notes: list[str] = []
    stored, bytes_before = _stored(folder, model, notes)
    complete = bytes_before is not None
    tokens = _tokens(folder, model, recipe, complete, notes)
    # checks the recipe against the model, and knows which biases are added
    driver = Driver(InMemory(model), (), recipe, torch.device("cpu"), Silent(), Clock(torch.device("cpu")))
    costs = budgets(driver.store, recipe)
    widths_before, parameters_before = layout.read(model), _parameters(model)
    layer_flops = _layer_flops(model, adapter, tokens.seq_len)
    forward = layer_flops[: driver.targets.stop]
    head = _head_flops(model)
    working = compute_dtype(recipe.dtype, device)
    item = (working or _dtype_of(stored)).itemsize
    memory = _weights(model, adapter, item)
    written_before = _written(model, adapter, stored, "auto")

    sites = _shrink(model, adapter, recipe, driver, notes)
    removed = sum((s.units_before - s.units_after) * costs[s.layer, s.kind].cost for s in sites)
    targeted = sum(budget.units * budget.cost for budget in costs.values())
    bytes_after = _written(model, adapter, stored, recipe.dtype)
    memory |= _activations(sites, tokens, text_config(model.config).hidden_size, item, recipe)
    memory["write_buffer"] = min(bytes_after, SHARD_BYTES)
    on_host = ("write_buffer",) if device.type == "cuda" else ()
    memory["peak"] = sum(v for k, v in memory.items() if k not in on_host)
    flops = _flops(sites, tokens, sum(forward), recipe)
    rates = rates or measure(device, working or _dtype_of(stored))
    seconds = {
        "forward": flops["forward"] / rates["forward"],
        "gram": flops["gram"] / rates["gram"],
        "solve": (flops["solve"] + flops["residual"]) / rates["solve"],
    }
    width = max(s.columns_before for s in sites) if RECONSTRUCTIONS[recipe.reconstruct].solves else 1
    return {
        "source": str(source),
        "model_type": adapter.model_type,
        "layers": len(widths_before),
        "recipe": recipe.to_json(),
        "exact": not ALLOCATIONS[recipe.allocation].needs_scores,
        "sites": [asdict(site) for site in sites],
        "parameters": {"before": parameters_before, "after": _parameters(model)},
        "bytes": {"before": written_before if bytes_before is None else bytes_before, "after": bytes_after},
        "sparsity": {"asked": recipe.sparsity, "achieved": removed / targeted},
        "flops_per_token": {
            "context": tokens.seq_len,
            "before": sum(layer_flops) + head,
            "after": sum(_layer_flops(model, adapter, tokens.seq_len)) + head,
        },
        "calibration": {
            **asdict(tokens),
            "minimum": width,
            "recommended": RECOMMENDED_TOKENS_PER_COLUMN * width,
            "problem": _shortage(tokens.tokens, width),
        },
        "flops": flops,
        "memory": memory,
        "seconds": {
            **seconds, "total": sum(seconds.values()),
            "device": device_name(device), "rates": dict(rates),
        },
        "loader": _loader(model, adapter, recipe, dense, widths_before, driver.added_biases),
        "notes": notes,
    }


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of square matmuls for each phase, on this machine as it is loaded now.

    The forward pass computes in `dtype`; the Gram does so on a GPU and in float32 on a CPU; the
    solve is float64.
    """
    wanted = {"forward": dtype, "solve": torch.float64}
    wanted["gram"] = dtype if device.type == "cuda" else torch.float32
    rates = {kind: _matmul_rate(device, kind) for kind in set(wanted.values())}
    return {phase: rates[kind] for phase, kind in wanted.items()}


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = MEASURE_SIZE[device.type]
    a = torch.ones(n, n, dtype=dtype, device=device)
    out = a @ a  # the first call pays for threads and libraries
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURE_SECONDS:
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    return done * 2 * n**3 / elapsed


def _folder(source: str | Path) -> Path:
    """Of a hub repository, only `config.json` is fetched; what is cached beside it is used."""
    path = Path(source).expanduser()
    name = str(source)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return resolve(source)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source}: neither a folder nor a hub repository that can be reached ({reason})"
        ) from error


def _stored(folder: Path, model: PreTrainedModel, notes: list[str]) -> tuple[dict[str, str], int | None]:
    """The dtype of each tensor as safetensors names it, and the bytes of the files.

    Without weights, the dtype is the config's and the bytes are None.
    """
    if _has_weights(folder):
        reader = CheckpointReader(folder)
        left_over = reader.bind(model)
        if left_over:
            notes.append(f"{len(left_over)} tensors are no part of the model, first {left_over[0]}")
        names = {name: stored for name, stored in reader._names.items()}
        return {n: reader._slice(s).get_dtype() for n, s in names.items()}, reader.bytes()
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
    """Counted from a local calibration file where there is one, else as many as the recipe allows."""
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
    notes.append(f"calibration not counted: {recipe.samples} samples of {length} tokens assumed{short}")
    return Tokens(total, total, recipe.samples, length, counted=False)


def _shortage(tokens: int, width: int) -> str | None:
    try:
        return check_enough(tokens, width)
    except InputError as error:
        return str(error)


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
        rows = _producer_rows(site)
        site.shrink(torch.arange(units))
        outputs = site.weight().shape[0]
        sites.append(
            SitePlan(index, kind, site.name, before, units, columns, site.columns, outputs, rows)
        )
    for index in range(len(adapter.layer_list(model)[1])):
        for site in adapter.sites_of(model, index, tuple(driver.added_biases)):
            site.add_biases(filler=site.spec.bias_flag is not None)
    return sites


def _producer_rows(site: Site) -> int:
    modules = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
    return sum(linear.weight(module).shape[0] for module in modules.values())


def _parameters(model: nn.Module) -> int:
    assert isinstance(model, PreTrainedModel)
    tied = tied_names(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def _written(model: PreTrainedModel, adapter: Adapter, stored: Mapping[str, str], dtype: str) -> int:
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


def _layer_flops(model: PreTrainedModel, adapter: Adapter, length: int) -> list[int]:
    """Forward FLOPs of each layer for one token in a sequence of `length`: linears and attention."""
    # causal attention reads half of the sequence on average
    context = (length + 1) / 2 if adapter.decoder else length
    found = []
    for index, layer in enumerate(adapter.layer_list(model)[1]):
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
        attended = sum(site.columns for site in adapter.sites_of(model, index, ("heads",)))
        found.append(int(2 * sum(m.weight.numel() for m in linears) + 4 * attended * context))
    return found


def _head_flops(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return 0 if head is None else 2 * head.weight.numel()


def _flops(sites: list[SitePlan], tokens: Tokens, forward: int, recipe: Recipe) -> dict[str, int]:
    """FLOPs of one compression by what they are for; `residual` is the report's diagnostic."""
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    passes = 2 if ALLOCATIONS[recipe.allocation].needs_scores else 1
    solve = 0
    for s in sites:
        dropped = s.columns_before - s.columns_after
        if solves and dropped:
            right = min(dropped, s.outputs)
            solve += s.columns_after**3 // 3 + 2 * s.columns_after**2 * right
            solve += 2 * s.outputs * s.columns_after * dropped
    return {
        "forward": passes * tokens.positions * forward,
        # n² multiplications and additions for each token: only the triangle is computed
        "gram": sum(s.columns_before**2 for s in sites) * tokens.tokens,
        "solve": solve,
        "residual": sum(4 * s.outputs * s.columns_before**2 for s in sites),
    }


def _weights(model: PreTrainedModel, adapter: Adapter, item: int) -> dict[str, int]:
    """Bytes of the weights held at once: what runs before the layers, and the largest layer."""
    backbone = adapter.backbone(model)[1]
    layers = [_count(layer) for layer in adapter.layer_list(model)[1]]
    return {"embeddings": (_count(backbone) - sum(layers)) * item, "layer": max(layers) * item}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activations(
    sites: list[SitePlan], tokens: Tokens, hidden: int, item: int, recipe: Recipe
) -> dict[str, int]:
    """Bytes of activations, statistics and solve at the Site that needs most."""
    solves = RECONSTRUCTIONS[recipe.reconstruct].solves
    needs = []
    for s in sites:
        n, kept = s.columns_before, s.columns_after
        right = min(n - kept, s.outputs)
        # system, centred copy, scaled copy and factor; cross block; right side, solution, scratch
        system = 4 * kept**2 + kept * (n - kept) + 3 * kept * right if solves else 0
        # what a paused forward keeps: its residual stream and normed input, or q, k and v
        frames = hidden + (s.producer_rows if s.kind == "heads" else hidden)
        needs.append({
            "site_inputs": tokens.positions * n * item,
            "paused_forwards": tokens.positions * frames * item,
            "moments": 4 * n**2,
            "solve": 8 * (system + 2 * s.outputs * n),
        })
    worst = max(needs, key=lambda need: sum(need.values()))
    return {"hidden_states": tokens.positions * hidden * item, **worst}


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
    changed = [s for s in adapter.sites if any(a[s.kind] != b[s.kind] for a, b in zip(after, before, strict=True))]
    reason = None
    if not ALLOCATIONS[recipe.allocation].equal:
        reason = f"--allocation {recipe.allocation} gives every layer its own width"
    elif any(len({widths[s.kind] for widths in after}) > 1 for s in changed):
        reason = "the widths differ between layers"
    elif unstated := [s.kind for s in changed if s.config_fields is None]:
        reason = f"a {adapter.model_type} config cannot state fewer {' or '.join(unstated)}"
    elif unflagged := [s.kind for s in adapter.sites if s.kind in added_biases and s.bias_flag is None]:
        reason = f"a {adapter.model_type} config cannot state the biases added to {', '.join(unflagged)}"
    values = None if reason else layout.equal_values(model, before)
    config = layout.describe(dense, adapter, after, values, added_biases)
    name = layout.loader_of(config, dense)
    stock = name.startswith("stock")
    if not stock and reason is None:
        reason = f"the {adapter.model_type} config class rejects these widths"
    return {
        "stock": stock,
        "layout": name,
        "with": f"transformers.{auto_class(config)}" if stock else "liar_ext.load",
        "why_not_stock": reason,
    }


def render(plan: Mapping[str, Any]) -> RenderableType:
    """A plan as rich tables."""
    about = "" if plan["exact"] else "about "
    result = Table("", "before", "after", "change", title=Text(f"{plan['source']}: the result"))
    shown = (("parameters", "parameters", count), ("weight files", "bytes", size), ("FLOPs per token", "flops_per_token", count))
    for label, key, show in shown:
        before, after = plan[key]["before"], plan[key]["after"]
        result.add_row(label, show(before), about + show(after), change(before, after))
    for kind in dict.fromkeys(site["kind"] for site in plan["sites"]):
        own = [site for site in plan["sites"] if site["kind"] == kind]
        before, after = (sorted({site[f"units_{w}"] for site in own}) for w in ("before", "after"))
        total = [sum(site[f"units_{w}"] for site in own) for w in ("before", "after")]
        label = f"{kind} units in {len(own)} layers"
        result.add_row(label, _listed(before), about + _listed(after), change(*total))
    cost = Table("", "FLOPs", "seconds", title="the compression")
    flops, seconds = plan["flops"], plan["seconds"]
    cost.add_row("forward", count(flops["forward"]), duration(seconds["forward"]))
    cost.add_row("Gram", count(flops["gram"]), duration(seconds["gram"]))
    solve = count(flops["solve"] + flops["residual"])
    cost.add_row("solve and residual", solve, duration(seconds["solve"]))
    cost.add_row("at least", "", duration(seconds["total"]))
    memory = Table("", "memory", title="held at once")
    for key, value in plan["memory"].items():
        memory.add_row(key.replace("_", " "), size(value))
    data, loader = plan["calibration"], plan["loader"]
    why = f", because {loader['why_not_stock']}" if loader["why_not_stock"] else ""
    lines = [
        f"sparsity: {percent(plan['sparsity']['asked'])} asked, {about}{percent(plan['sparsity']['achieved'])} reached",
        f"loads with {loader['with']}{why}",
        f"calibration: {data['tokens']:,} tokens; {data['minimum']:,} needed, {data['recommended']:,} recommended",
        f"seconds are FLOPs at the matmul rate of {seconds['device']} measured just now; reading, "
        "writing and memory-bound work come on top",
        *([f"warning: {data['problem']}"] if data["problem"] else []),
        *plan["notes"],
    ]
    return Group(result, cost, memory, Text("\n".join(lines)))


def _listed(values: list[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

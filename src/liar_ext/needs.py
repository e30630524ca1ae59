"""Memory and disk that one compression needs, from the bytes of a model, tokens and a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.dtypes import DTYPE_BYTES, DTYPES
from liar_ext.choice_costs import ChoicePlan
from liar_ext.costs import SitePlan, Tokens
from liar_ext.criteria import CRITERIA
from liar_ext.engine.execution import HELD_SHARE as SHARE
from liar_ext.engine.execution import Execution, choose_place, free_bytes
from liar_ext.engine.moments_store import MomentsStore
from liar_ext.memory import Phases
from liar_ext.memory_parts import (
    Sizes,
    Weights,
    advice,
    peak,
    power_of_two,
    resident_bytes,
    with_host_part,
)
from liar_ext.models.adapter import Adapter, text_config
from liar_ext.prior_costs import PriorPlan
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS
from liar_ext.report.text import size
from liar_ext.search_costs import SearchSizes, search_phases
from liar_ext.survey import needs_tokens, reads_of

__all__ = ["Weights", "needs", "resident_bytes", "weights_of"]


def weights_of(
    model: PreTrainedModel, adapter: Adapter, stored: Mapping[str, str], dtype: torch.dtype
) -> Weights:
    """Of a model on `meta`.

    Args:
        stored: the dtype of each tensor as safetensors names it. dtype: what is computed in.
    """
    layers = adapter.chain(model)
    backbone_path, backbone = adapter.backbone(model)
    most: dict[str, int] = {"layer": 0}
    for index, layer in enumerate(layers):
        named = {f"{layers.path(index)}.{name}": p for name, p in layer.named_parameters()}
        count = sum(parameter.numel() for parameter in named.values())
        if count * dtype.itemsize > most["layer"]:
            read = {name: p.numel() * DTYPE_BYTES[stored[name]] for name, p in named.items()}
            other = [read[name] for name in named if DTYPES.get(stored[name]) != dtype]
            most = {
                "layer": count * dtype.itemsize,
                "read": sum(read.values()),
                "pinned": sum(power_of_two(value) for value in read.values()),
                "largest": max(other, default=0),
            }
    outside = {
        full: parameter
        for name, parameter in backbone.named_parameters()
        if layers.layer_of(full := f"{backbone_path}.{name}".lstrip(".")) is None
    }
    other = [
        parameter.numel() * DTYPE_BYTES[stored[name]]
        for name, parameter in outside.items()
        if name in stored and DTYPES.get(stored[name]) != dtype
    ]
    return Weights(
        item=dtype.itemsize,
        hidden=text_config(model.config).hidden_size,
        outside=sum(parameter.numel() for parameter in outside.values()) * dtype.itemsize,
        outside_read=max(other, default=0),
        layers=len(layers),
        handed=_handed(model, adapter),
        **most,
    )


def needs(
    weights: Weights,
    sites: Sequence[SitePlan],
    tokens: Tokens,
    recipe: Recipe,
    execution: Execution,
    *,
    process: int,
    written: int,
    output: int,
    held: int,
    survey_bytes: int,
    prior: PriorPlan | None,
    learning: tuple[int, int] | None,
    search: SearchSizes | None,
    choice: ChoicePlan | None,
    ranks: int,
    out: Path | None,
    device: torch.device,
    device_memory: int | None,
) -> dict[str, Any]:
    """`memory`, `phases`, `hidden_states` and `disk` of a plan, and whether there is a `library`.

    Args:
        process: bytes of the process before anything is computed; written: of the largest pruned
            layer, output: of all of them; held: of what waits on the shelf, of all ranks;
            survey_bytes: of what a survey makes of its statistics, at most.
        prior: of a pass before pruning, search: of a search, choice: of the choice of layers that
            are left out; None without one.
        learning: see `memory.Phases`.
    """
    cuda = device.type == "cuda"
    held_by_one = held // ranks
    if prior is not None:
        # one after the other
        held_by_one, held = max(held_by_one, prior.held), max(held, ranks * prior.held)
    if search is not None:
        states = search.states * weights.hidden * weights.item
        held_by_one, held = max(held_by_one, states), max(held, ranks * states)
    if choice is not None:
        held_by_one, held = max(held_by_one, choice.held), max(held, ranks * choice.held)
    place, why = _place(execution, held_by_one, ranks, device, device_memory)
    paired = recipe.paired
    snapshots = 2 * (2 if paired else 1) * tokens.positions * weights.hidden * weights.item
    scratch = held if place == "disk" else 0
    levels = 0 if search is None else search.disk
    disk = _disk(sites, recipe, execution, output, snapshots, levels, scratch, out)
    library = "moments" in disk
    sizes = Sizes(
        cuda=cuda,
        place=place,
        process=process,
        written=written,
        ranks=ranks,
        positions=_of_rank(tokens, ranks),
        batch=tokens.batch,
        # where layers are left out, the whole model has its own
        masks=(2 if any(site.across for site in sites) else 1) * _masks(tokens, weights),
        alone=tokens.segments <= 1,
        **asdict(weights),
    )
    order = sorted(sites, key=lambda site: (site.columns_before, site.across))
    widest = {site.kind: site for site in order}
    made = Phases(
        sizes,
        # in the order of a layer's forward
        [widest[kind] for kind in dict.fromkeys(site.kind for site in sites)],
        sequential=recipe.statistics == "sequential",
        survey=reads_of(recipe),
        survey_bytes=survey_bytes,
        learning=learning,
        library=library,
        reconstruction=RECONSTRUCTIONS[recipe.reconstruct],
        chooses=recipe.chooses_ridge,
        paired=paired,
        judging=lambda site: CRITERIA[recipe.criterion].holds(
            site.columns_before, site.outputs, site.columns_before - site.columns_after
        ),
    )
    phases = made.all()
    if search is not None:
        phases += [*made.making_levels(search.levels), *search_phases(sizes, search)]
    if choice is not None:
        phases = [*choice.phases(sizes), *phases]
    if prior is not None:
        # those of all layers, to the end
        phases = [
            with_host_part(sizes, phase, prior.part, times * prior.kept)
            for times, some in ((prior.gathered, prior.phases(sizes)), (1, phases))
            for phase in some
        ]
    on_device, on_host = peak(phases)
    further = {"device": ["host", "disk"] if cuda else ["disk"], "host": ["disk"], "disk": []}
    most = on_device.device_bytes
    host_most = on_host.host_bytes if cuda else most
    lacking = _lacking(device, device_memory, most if cuda else most - process, host_most - process)
    return {
        "memory": {
            **on_device.device,
            "peak": most,
            "device_peak": most,
            "host_peak": host_most,
        },
        "phases": {
            "peak": on_device.name,
            "host_peak": on_host.name,
            "lower": advice(on_device, " or ".join(further[place])),
            "problem": lacking,
            "all": [asdict(phase) for phase in phases],
        },
        "hidden_states": {"place": place, "bytes": held_by_one, "why": why},
        "disk": disk,
        "library": library,
    }


def _handed(model: PreTrainedModel, adapter: Adapter) -> int:
    """Of T5 position biases: of each stack, and between the two."""
    if not adapter.hands_on:
        return 0
    return int(text_config(model.config).num_attention_heads) * (3 if adapter.then else 1)


def _masks(tokens: Tokens, weights: Weights) -> int:
    """Bytes of attention masks and of what first layers hand on; full windows share theirs."""
    padded = tokens.tokens < tokens.positions
    batches = -(-tokens.positions // tokens.batch) if padded else 1
    handed = weights.handed * tokens.seq_len**2 * weights.item * batches
    return handed + (tokens.positions * tokens.seq_len if padded else 0)


def _of_rank(tokens: Tokens, ranks: int) -> int:
    """Positions of the rank with most; ranks have whole segments."""
    most = -(-tokens.segments // ranks) * tokens.positions / tokens.segments
    return min(max(int(most), tokens.batch), tokens.positions)


def _place(
    execution: Execution, held: int, ranks: int, device: torch.device, device_memory: int | None
) -> tuple[str, str]:
    """Where hidden states and paused forwards wait, and why."""
    wanted = execution.hidden_states
    if wanted == "auto" and device_memory is not None:
        host = choose_place(wanted, held, torch.device("cpu"), ranks)
        place = "device" if held <= SHARE * device_memory else {"device": "host"}.get(host, host)
    else:
        place = choose_place(wanted, held, device, ranks)
    if wanted != "auto":
        return place, "as asked"
    if place == "device":
        return place, f"{size(held)} are at most {SHARE:.0%} of the free memory"
    return place, f"{size(held)} are more than {SHARE:.0%} of the free memory"


def _lacking(
    device: torch.device, device_memory: int | None, asked: int, asked_of_host: int
) -> str | None:
    """What does not fit. What this process has already is not asked for again."""
    host = torch.device("cpu")
    free = device_memory if device_memory is not None else free_bytes(device)
    found = [(asked, device.type, free)]
    # the host beside a GPU that is elsewhere is elsewhere, too
    if device.type == "cuda" and device_memory is None:
        found.append((asked_of_host, host.type, free_bytes(host)))
    lines = [
        f"{size(most)} of memory are needed on {where}, and {size(left)} are free"
        for most, where, left in found
        if most > left
    ]
    return "; ".join(lines) or None


def _disk(
    sites: Sequence[SitePlan],
    recipe: Recipe,
    execution: Execution,
    output: int,
    snapshots: int,
    levels: int,
    scratch: int,
    out: Path | None,
) -> dict[str, Any]:
    """Bytes beside the output folder, what its disk has, and what is wrong with that.

    The total is what is there at once: of two snapshots of the hidden states one is removed when
    the other is complete.
    """
    folder = _existing(Path.cwd() if out is None else out.absolute().parent)
    parts = {"output": output, "snapshots": snapshots, **({"levels": levels} if levels else {})}
    elsewhere: list[tuple[Path, int]] = []

    def add(name: str, value: int, own: Path | None) -> None:
        if own is None:
            parts[name] = value
        elif value:
            elsewhere.append((_existing(own.absolute()), value))
            parts[name] = value

    add("scratch", scratch, execution.scratch)
    free = shutil.disk_usage(folder).free
    moments = MomentsStore.bytes_needed(site.columns_before for site in sites)
    if recipe.chooses_ridge:
        moments *= 2  # and of the tokens that are held out
    if recipe.statistics == "oneshot":
        twice = needs_tokens(recipe) and 2 * moments <= free
        if execution.moments is not None or twice:
            add("moments", moments, execution.moments)
    # levels go before the output is made
    total = sum(parts.values()) - min(levels, output + snapshots)
    own = total - sum(value for _, value in elsewhere)
    lacking = [
        f"{size(value)} are needed in {where}, whose disk has {size(left)} free"
        for where, value in [(folder, own), *elsewhere]
        if value > (left := shutil.disk_usage(where).free)
    ]
    return {
        **parts,
        "total": total,
        "folder": str(folder),
        "free": free,
        "problem": "; ".join(lacking) or None,
    }


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())

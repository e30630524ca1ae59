"""`liar fuse`: tables, plans, the best of them as a checkpoint; all of it or nothing."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.bench.measure import spread
from liar_ext.checkpoint.load import load, resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.convolution.chain import Segment, chain_of, check_family
from liar_ext.convolution.images import Images, read_images
from liar_ext.convolution.journal import TableFile
from liar_ext.convolution.latency import measure_networks
from liar_ext.convolution.measure import Dense, Quality, quality
from liar_ext.convolution.network import PLAN, counted, describe, fused, weights_of
from liar_ext.convolution.plan import Plan, best_plans, fastest
from liar_ext.convolution.report import card
from liar_ext.convolution.settings import FuseSettings
from liar_ext.convolution.tables import (
    FOLDED,
    STOCK,
    measure_importance,
    measure_latency,
    options_of,
)
from liar_ext.convolution.training import finetune
from liar_ext.engine.inputs import resolve_device
from liar_ext.engine.progress import Progress, Silent
from liar_ext.environment import environment
from liar_ext.errors import InputError, Interrupted, UnsupportedModelError
from liar_ext.models import layout
from liar_ext.report.schema import CONVOLUTIONS, FILE

VERSION = 1
# calibration batches at least: every fourth chooses the ridge
BATCHES = 8
COUNTS_BEFORE = ("convolutions_before", "activations_before")
COUNTS_AFTER = ("convolutions_after", "activations_after")


def fuse(
    source: str | Path,
    out: str | Path,
    settings: FuseSettings,
    *,
    tables: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a convolutional network with fewer activations and convolutions.

    Tables of importance and latency are measured, the best plans within `settings.time` found,
    built, repaired and compared as whole networks on held-out images; the best of those that are
    measured to be fast enough is written. The source is only read.

    Args:
        source: folder or hub id of a ResNet or a MobileNetV2 for image classification.
        out: folder to make. `liar_ext.load` loads it; stock loaders refuse it.
        tables: file that keeps what was measured, and that other budgets start from; None for one
            beside `out` that is removed in the end.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: another kind of network, images or labels that do not fit, a table of something
            else, or no plan that is fast enough; `out` is then as it was.
        Interrupted: by Ctrl-C, after something was measured that the same command goes on from.
    """
    started = time.perf_counter()
    out, progress = Path(out), progress or Silent()
    folder = resolve(source)
    check_output(out, folder, overwrite=overwrite)
    reader = CheckpointReader(folder)
    _check_source(reader)
    device = resolve_device(settings.device)
    config = layout.config_object(reader.config)
    images = read_images(settings.images, folder, config)
    calibration, held_out = images.split(settings.held_out, settings.seed)
    model = load(folder, dtype=torch.float32, device=device)
    warnings = left_over_warnings(reader.bind(model), model)
    path = Path(tables) if tables is not None else beside(out)
    reader.start_hashing()
    sums = reader.hashes()
    identity = {
        "source": sums,
        "config": reader.config,
        "images": images.sha256,
        **settings.table_identity(),
        "device": environment(device)["device"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    table = TableFile(path, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = _chosen(model, calibration, held_out, settings, table, device, progress)
    except KeyboardInterrupt as error:
        if not len(table):
            raise
        raise Interrupted(
            f"interrupted; {len(table)} measurements are kept in {path}, and the same command goes "
            "on from there"
        ) from error
    data = describe(reader.config, found.plan)
    tensors = stored(found.model, reader.main_dtype())
    with output_folder(out, folder, overwrite=overwrite) as made:
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        copy_other_files(folder, made)
        report = {
            "version": VERSION,
            "kind": CONVOLUTIONS,
            "source": str(source),
            "date": datetime.date.today().isoformat(),
            "settings": settings.to_json(),
            "source_files": sums,
            "images": {
                "source": settings.images,
                "sha256": images.sha256,
                "calibration": len(calibration),
                "held_out": len(held_out),
                "size": list(images.pixels.shape[1:]),
            },
            **found.facts,
            "totals": {
                "parameters_before": parameter_count(model),
                "parameters_after": parameter_count(found.model),
                "bytes_before": reader.bytes(),
                "bytes_after": sum(t.numel() * t.element_size() for t in tensors.values()),
            },
            "warnings": [*warnings, *found.warnings],
            "seconds": time.perf_counter() - started,
            "config": data,
            "environment": environment(device),
        }
        write_json(made / "config.json", data)
        write_json(made / FILE, report)
        (made / "README.md").write_text(card(report), encoding="utf-8")
    if tables is None:
        with suppress(FileNotFoundError):
            path.unlink()
    return report


def beside(out: Path) -> Path:
    """Where the tables of a run are until its result is."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.tables.jsonl"


def stored(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's tensors as they are written: floating ones in a dtype, on the CPU."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }


def _check_source(reader: CheckpointReader) -> None:
    data = reader.config
    if PLAN in (data.get(layout.KEY) or {}):
        raise UnsupportedModelError(
            f"{reader.folder}: was written by `liar fuse`; give the network that it was made from"
        )
    if layout.KEY in data:
        raise UnsupportedModelError(f"{reader.folder}: is no convolutional network")
    names = data.get("architectures") or [None]
    check_family(layout.config_object(data), names[0])


@dataclass
class _Found:
    """The network that is written, its plan, and what the report says of both."""

    model: PreTrainedModel
    plan: Sequence[Segment]
    facts: dict[str, Any]
    warnings: list[str]


@dataclass
class _Candidate:
    """A plan as a whole network: what merging gives, what the repair makes of it, and its measured
    time as a share of the dense network's in the same rounds."""

    plan: Plan
    segments: list[Segment]
    model: PreTrainedModel
    merged: Quality
    quality: Quality
    repairs: list[dict[str, Any] | None]
    share: float = 0.0


def _chosen(
    model: PreTrainedModel,
    calibration: Images,
    held_out: Images,
    settings: FuseSettings,
    table: TableFile,
    device: torch.device,
    progress: Progress,
) -> _Found:
    chain = chain_of(model)
    weights = weights_of(model, chain)
    size = max(1, min(settings.batch_size, -(-len(calibration) // BATCHES)))
    batches = [batch.to(device) for batch in calibration.batches(size)]
    folded = fused(model, chain, weights, chain.dense)
    dense = Dense(folded, chain, weights, batches, settings.patches, settings.seed)
    segments = chain.segments(weights.norms(), settings.largest_kernel)
    shape = tuple(calibration.pixels.shape[1:])
    works = measure_latency(dense, model, segments, shape, settings, table, progress)
    reached = measure_importance(dense, segments, held_out, settings, table, progress)
    options = options_of(dense, works, reached, settings, table)
    samples = table.samples()
    whole = median(samples[FOLDED])
    inside = sum(o.seconds for o, s in zip(options, works, strict=True) if s in chain.dense)
    # stem, pooling, head and what lies between calls: no plan changes it
    rest = max(whole - inside, 0.0)
    plans = _plans(options, chain.length, whole, rest, settings)
    by_key = {segment.key: segment for segment in segments}
    candidates: list[_Candidate] = []
    progress.begin(len(plans), "plans")
    for number, plan in enumerate(plans):
        own = [by_key[o.start, o.end, o.kernel] for o in plan.options]
        candidates.append(_built(dense, plan, own, held_out, settings))
        progress.layer(number)
    best, told, warnings = _best(dense.model, candidates, shape, settings)
    for message in warnings:
        progress.warn(message)
    training = None
    final = best.quality
    if settings.finetune_steps:
        training = finetune(
            best.model, batches, settings, settings.finetune_steps, progress=progress
        )
        final = quality(best.model, held_out, settings.batch_size)
    facts = {
        "network": {
            **dict(zip(COUNTS_BEFORE, counted(dense.model), strict=True)),
            **dict(zip(COUNTS_AFTER, counted(best.model), strict=True)),
        },
        "plan": [
            {**segment.to_json(), "importance": o.importance, "ms": o.seconds * 1e3, "repair": r}
            for segment, o, r in zip(best.segments, best.plan.options, best.repairs, strict=True)
        ],
        "latency": {
            "stock": spread(samples[STOCK]),
            "folded": spread(samples[FOLDED]),
            "outside_of_the_plan_ms": rest * 1e3,
            "asked": settings.time,
            "predicted": (best.plan.seconds + rest) / whole,
            **told,
        },
        "candidates": [_row(c, whole, rest) for c in candidates],
        "quality": {
            "dense": reached.to_json(),
            "merged": best.merged.to_json(),
            "repaired": best.quality.to_json() if settings.repair == "liar" else None,
            "final": final.to_json(),
        },
        "table": {"segments": len(segments), "works": len(samples) - 2},
        "training": training,
    }
    return _Found(best.model, best.segments, facts, warnings)


def _plans(
    options: Sequence[Any], length: int, whole: float, rest: float, settings: FuseSettings
) -> list[Plan]:
    """Raises InputError where none is fast enough; says what would be."""
    budget = settings.time * whole - rest
    least = fastest(options, length)
    if least is None or least.seconds > budget:
        floor = rest + (0.0 if least is None else least.seconds)
        raise InputError(
            f"--time {settings.time:g}: no plan is that fast; the fastest is predicted to take "
            f"{floor / whole:.3f} of the dense network's {whole * 1e3:.4g} ms"
        )
    return best_plans(options, length, budget, top=settings.top, steps=settings.steps)


def _built(
    dense: Dense, plan: Plan, segments: list[Segment], held_out: Images, settings: FuseSettings
) -> _Candidate:
    """A plan as a network, repaired from its first segment to its last."""
    model = dense.replaced(segments)
    merged = reached = quality(model, held_out, settings.batch_size)
    repairs: list[dict[str, Any] | None] = [None] * len(segments)
    if settings.repair == "liar":
        changed = False
        for place, segment in enumerate(segments):
            # up to the first segment that is another one, all is as in the dense network
            changed = changed or segment not in dense.chain.dense
            if changed:
                repairs[place] = dense.repair(model, segments, segment)
        reached = quality(model, held_out, settings.batch_size)
    return _Candidate(plan, segments, model, merged, reached, repairs)


def _best(
    folded: PreTrainedModel,
    candidates: Sequence[_Candidate],
    shape: Sequence[int],
    settings: FuseSettings,
) -> tuple[_Candidate, dict[str, Any], list[str]]:
    """The plan with the least loss of those that are measured to be fast enough."""
    models = {"dense": folded, **{str(i): c.model for i, c in enumerate(candidates)}}
    samples = measure_networks(models, shape, settings.batch_size, settings.repeats)
    for number, candidate in enumerate(candidates):
        rounds = zip(samples[str(number)], samples["dense"], strict=True)
        candidate.share = median(own / dense for own, dense in rounds)
    fast = [c for c in candidates if c.share <= settings.time]
    warnings = []
    if fast:
        best = min(fast, key=lambda c: c.quality.loss)
    else:
        best = min(candidates, key=lambda c: c.share)
        warnings.append(
            f"measured, the fastest of {len(candidates)} plans takes {best.share:.3f} of "
            f"the dense network's time, {settings.time:g} was asked for: the table predicts too "
            "little here; ask for less, or measure with more --repeats"
        )
    told = {
        "measured": best.share,
        "again": {"folded": spread(samples["dense"])},
        "result": spread(samples[str(candidates.index(best))]),
    }
    return best, told, warnings


def _row(candidate: _Candidate, whole: float, rest: float) -> dict[str, Any]:
    return {
        "segments": [list(s.key) for s in candidate.segments],
        "importance": candidate.plan.importance,
        "predicted": (candidate.plan.seconds + rest) / whole,
        "measured": candidate.share,
        "merged": candidate.merged.to_json(),
        "repaired": candidate.quality.to_json(),
    }

"""`--format padded`: layers padded with zero units to one width, from file to file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import (
    PIECE_BYTES,
    CheckpointReader,
    left_over_warnings,
    parameter_count,
)
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.export.padding import Widening, absent_values, widenings
from liar_ext.export.report import export_card, export_report
from liar_ext.export.widths import Widths, stock_config, uneven
from liar_ext.models import adapter_for, layout
from liar_ext.report.schema import FILE

NO_FASTER = (
    "The zeros are computed with like everything else: no FLOPs, memory or time is saved over a "
    "model of these widths. Padding is for servers that load no other shapes."
)


@dataclass(frozen=True)
class Padded:
    """What is to be written.

    Attributes:
        reader: bound to `narrow`; narrow, wide: both on `meta`.
        config: the `config.json` of `wide`.
        before, after: units of each layer, see `layout.read`.
    """

    reader: CheckpointReader
    narrow: PreTrainedModel
    wide: PreTrainedModel
    config: dict[str, Any]
    before: list[dict[str, int]]
    after: list[dict[str, int]]
    warnings: list[str]


def export_padded(
    source: str | Path,
    out: str | Path,
    widths: Widths = Widths(),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint whose layers have one width, by zero units, and that stock loads.

    One tensor is in memory at a time. The function is the same; the sums have more terms, zeros,
    and may be rounded in another order.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says.
    Raises:
        InputError: nothing to pad, what the stock config cannot state (biases that the family has
            no flag for), or anything else that cannot be exact; `out` is then as it was.
    """
    started = time.perf_counter()
    folder, out = resolve(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    plan = plan_padded(folder, widths)
    specs = _specs(plan)
    with output_folder(out, folder, overwrite=overwrite) as made:
        write_padded(made, plan, specs, progress or Silent())
        copy_other_files(folder, made)
        write_json(made / "config.json", plan.config)
        report = export_report(
            source,
            folder,
            "padded",
            totals={
                "parameters_before": parameter_count(plan.narrow),
                "parameters_after": parameter_count(plan.wide),
                "bytes_before": plan.reader.bytes(),
                "bytes_after": sum(spec.bytes for spec in specs),
            },
            config=plan.config,
            warnings=plan.warnings,
            seconds=time.perf_counter() - started,
            export=_what(plan, widths),
        )
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def plan_padded(folder: Path, widths: Widths) -> Padded:
    """What `export_padded` would write, checked; nothing is computed.

    Raises:
        InputError: as `export_padded`.
    """
    reader = CheckpointReader(folder)
    if "convolutions" in (reader.config.get(layout.KEY) or {}):
        raise InputError(f"{folder}: is a convolutional network; there are no widths to pad")
    narrow = layout.empty(reader.config)
    left_over = reader.bind(narrow)
    before = layout.read(narrow)
    config, after = stock_config(reader.config, narrow, widths)
    wide = layout.empty_model(layout.config_object(config))
    if parameter_count(wide) == parameter_count(narrow):
        raise InputError(
            f"{folder}: nothing to pad, all its layers have these widths and stock transformers "
            "loads it as it is"
        )
    warnings = left_over_warnings(left_over, narrow) + uneven(after[0], widths)
    return Padded(reader, narrow, wide, config, before, after, warnings)


def write_padded(made: Path, plan: Padded, specs: list[TensorSpec], progress: Progress) -> None:
    """Write the tensors of the wide model.

    Raises:
        InputError: one that the narrow model has in another shape and that is no Site's.
    """
    own = widenings(plan.wide)
    absent = absent_values(plan.wide, plan.before)
    layers_path, layers = adapter_for(plan.narrow.config).layer_list(plan.narrow)
    narrow = layout.shapes_of(plan.narrow)
    writer = ShardWriter(made, specs)
    done = -1
    progress.begin(len(layers), "pad")
    try:
        for spec in specs:
            writer.write_pieces(spec.name, _pieces(plan.reader, spec, narrow, own, absent))
            if spec.name.startswith(f"{layers_path}."):
                at = int(spec.name.removeprefix(f"{layers_path}.").partition(".")[0])
                for layer in range(done + 1, at):
                    progress.layer(layer)
                done = max(done, at - 1)
        writer.finish()
    finally:
        writer.close()


def _pieces(
    reader: CheckpointReader,
    spec: TensorSpec,
    narrow: dict[str, tuple[int, ...]],
    own: dict[str, Widening],
    absent: dict[str, float],
) -> Iterator[Tensor]:
    """A tensor of the wide model, in pieces."""
    if narrow.get(spec.name) == spec.shape:
        yield from reader.pieces(spec.name)
    elif spec.name in absent:
        yield from _constant(spec, absent[spec.name])
    elif spec.name in own and spec.name in reader:
        yield own[spec.name](reader.get(spec.name), spec.shape)
    else:
        raise InputError(
            f"{spec.name}: would be {spec.shape} and is {narrow.get(spec.name)}, and belongs to no "
            "prunable structure: zeros there would change the function; load this folder with "
            "liar_ext.load"
        )


def _constant(spec: TensorSpec, value: float) -> Iterator[Tensor]:
    left, most = prod(spec.shape), PIECE_BYTES // spec.dtype.itemsize
    while left > 0:
        yield torch.full((min(left, most),), value, dtype=spec.dtype)
        left -= most


def _specs(plan: Padded) -> list[TensorSpec]:
    """The tensors of the wide model, in its order; what the narrow one lacks is as in another of
    its layers."""
    path, layers = adapter_for(plan.narrow.config).layer_list(plan.narrow)
    specs = []
    for name, tensor in plan.wide.state_dict().items():
        dtype = None
        if name in plan.reader:
            dtype = plan.reader.dtype(name)
        elif name.startswith(f"{path}."):
            rest = name.removeprefix(f"{path}.").partition(".")[2]
            same = (f"{path}.{index}.{rest}" for index in range(len(layers)))
            like = next((n for n in same if n in plan.reader), None)
            dtype = plan.reader.main_dtype() if like is None else plan.reader.dtype(like)
        if dtype is not None:
            specs.append(TensorSpec(name, tuple(tensor.shape), dtype))
    return specs


def _what(plan: Padded, widths: Widths) -> dict[str, Any]:
    kinds = list(plan.before[0])
    return {
        "to": widths.to,
        "round_to": widths.round_to,
        "tensor_parallel": widths.tensor_parallel,
        "units": {
            kind: {
                "before": [layer[kind] for layer in plan.before],
                "after": plan.after[0][kind],
            }
            for kind in kinds
        },
        "loads_with": f"stock transformers, as {plan.config['model_type']}",
        "note": NO_FASTER,
    }


def _card(report: dict[str, Any]) -> str:
    lines = [
        f"- {kind}: {', '.join(map(str, own['before']))} (layer by layer) padded to {own['after']}"
        for kind, own in report["export"]["units"].items()
    ]
    return export_card(
        report,
        "padded",
        "The pruned model, with zero units in its layers so that all have one width.\n\n"
        + "\n".join(lines)
        + f"\n\n{NO_FASTER} Its outputs are those of the pruned model up to rounding. Loads with "
        "transformers' `from_pretrained`.",
    )

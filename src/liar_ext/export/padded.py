"""`--format padded`: layers padded with zero units to one width, from file to file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.shards import ShardWriter
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.engine.progress import Progress, Silent
from liar_ext.errors import InputError
from liar_ext.export.report import export_card, export_report
from liar_ext.export.source import source_folder
from liar_ext.export.widened import Widened
from liar_ext.export.widths import Widths, stock_config, uneven
from liar_ext.models import layout
from liar_ext.report.front_matter import TRANSFORMERS
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
    folder, out = source_folder(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    plan = plan_padded(folder, widths)
    tensors = Widened(plan.reader, plan.narrow, plan.wide)
    watcher = progress or Silent()
    watcher.begin(len(plan.before), "pad")
    with output_folder(out, folder, overwrite=overwrite) as made:
        write_padded(made, tensors, watcher)
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
                "bytes_after": sum(spec.bytes for spec in tensors.specs),
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


def write_padded(made: Path, tensors: Widened, progress: Progress) -> None:
    """Write the tensors of the wide model.

    Raises:
        InputError: as `Widened.pieces`.
    """
    writer = ShardWriter(made, tensors.specs)
    last = -1
    try:
        for spec in tensors.specs:
            writer.write_pieces(spec.name, tensors.pieces(spec))
            if (layer := tensors.layer_of(spec.name)) is not None and layer > last:
                progress.layer(layer)
                last = layer
        writer.finish()
    finally:
        writer.close()


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
        ("structured-pruning",),
        TRANSFORMERS,
        "padded",
        "The pruned model, with zero units in its layers so that all have one width.\n\n"
        + "\n".join(lines)
        + f"\n\n{NO_FASTER} Its outputs are those of the pruned model up to rounding. Loads with "
        "transformers' `from_pretrained`.",
    )

"""Layers left out of a checkpoint, from file to file: no layer is in memory as a whole."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import count_of
from liar_ext.depth.shorten import shortened_checkpoint
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.models import layout
from liar_ext.report.schema import FILE, LAYERS, calibration_of

VERSION = 1


def drop_layers(
    source: str | Path, out: str | Path, dropped: Sequence[int], *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the checkpoint of a model without these layers; the source is only read.

    The result is as stock as the source: `from_pretrained` loads it, and it can be pruned like any
    other. Nothing repairs what the layers did.

    Args:
        source: folder or hub id, dense or pruned; out: folder to make; dropped: indices from 0.
        overwrite: replace `out` if it exists, once the new one is complete.
    Returns:
        what `out/liar_report.json` says: layers, parameters and bytes before and after, the config.
    Raises:
        InputError: layers that are not there or all of them, a model whose layers depend on their
            place, or anything else that cannot be used; `out` is then as it was.
    """
    started = time.perf_counter()
    folder, out = resolve(source), Path(out)
    check_output(out, folder, overwrite=overwrite)
    reader = CheckpointReader(folder)
    count = count_of(reader.config)
    if beyond := [layer for layer in dropped if not 0 <= layer < count]:
        raise InputError(
            f"--drop-layers {beyond[0]}: the model has {count} layers, 0 to {count - 1}"
        )
    # one that is named twice goes once
    dropped = sorted(set(dropped))
    kept = [layer for layer in range(count) if layer not in dropped]
    if not kept:
        raise InputError(f"--drop-layers: all {count} layers; keep at least one")
    dense = layout.empty(reader.config)
    left_over = reader.bind(dense)
    before = parameter_count(dense), reader.bytes()
    reader, model = shortened_checkpoint(reader, dense, kept)
    specs = [
        TensorSpec(name, reader.shape(name), reader.dtype(name))
        for name in model.state_dict()
        if name in reader
    ]
    with output_folder(out, folder, overwrite=overwrite) as made:
        writer = ShardWriter(made, specs)
        try:
            for spec in specs:
                writer.write_pieces(spec.name, reader.pieces(spec.name))
            writer.finish()
        finally:
            writer.close()
        copy_other_files(folder, made)
        report = {
            "version": VERSION,
            "kind": LAYERS,
            "source": str(source),
            "date": datetime.date.today().isoformat(),
            "layers": {"before": count, "after": len(kept), "dropped": sorted(dropped)},
            "totals": {
                "parameters_before": before[0],
                "parameters_after": parameter_count(model),
                "bytes_before": before[1],
                "bytes_after": writer.bytes,
            },
            # of widths that were pruned before
            "calibration": calibration_of(folder),
            "warnings": left_over_warnings(left_over, dense),
            "seconds": time.perf_counter() - started,
            "config": reader.config,
            "environment": environment(),
        }
        write_json(made / "config.json", reader.config)
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def _card(report: dict[str, Any]) -> str:
    layers, totals = report["layers"], report["totals"]
    gone = ", ".join(map(str, layers["dropped"]))
    loader = (
        "liar_ext.load" if layout.KEY in report["config"] else "transformers' `from_pretrained`"
    )
    return (
        f"# {Path(report['source']).name} without {len(layers['dropped'])} of its "
        f"{layers['before']} layers\n\n"
        f"Left out, counted from 0: {gone}. Nothing else was changed, nothing was trained, and "
        "what the layers did was not repaired: the quality was not measured.\n\n"
        f"{totals['parameters_before']:,} parameters before, {totals['parameters_after']:,} after. "
        f"Loads with {loader}.\n\n"
        f"Made by liar-ext {report['environment']['liar_ext']}; `{FILE}`:\n\n"
        f"```json\n{json.dumps(layers)}\n```\n"
    )

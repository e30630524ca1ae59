"""Layers left out of a checkpoint, from file to file: no layer is in memory as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, left_over_warnings, parameter_count
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import count_of
from liar_ext.depth.report import layer_card, layer_report
from liar_ext.depth.shorten import copy_tensors, shortened_checkpoint, specs_of
from liar_ext.errors import InputError
from liar_ext.models import layout
from liar_ext.report.schema import FILE, calibration_of


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
    specs = specs_of(reader, model)
    with output_folder(out, folder, overwrite=overwrite) as made:
        copy_tensors(made, reader, specs)
        copy_other_files(folder, made)
        report = layer_report(
            source,
            layers={"before": count, "after": len(kept), "dropped": sorted(dropped)},
            before=before,
            model=model,
            bytes_after=sum(spec.bytes for spec in specs),
            config=reader.config,
            # of widths that were pruned before
            calibration=calibration_of(folder),
            warnings=left_over_warnings(left_over, dense),
            seconds=time.perf_counter() - started,
        )
        write_json(made / "config.json", reader.config)
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def _card(report: dict[str, Any]) -> str:
    layers = report["layers"]
    gone = ", ".join(map(str, layers["dropped"]))
    return layer_card(
        report,
        ("pruned", "layer-pruning"),
        f"without {len(layers['dropped'])} of its {layers['before']} layers",
        f"Left out, counted from 0: {gone}. Nothing else was changed, nothing was trained, and "
        "what the layers did was not repaired: the quality was not measured.",
    )

"""Layers left out of a checkpoint, from file to file: no layer is in memory as a whole."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liar_ext.checkpoint.load import resolve
from liar_ext.checkpoint.reader import CheckpointReader, parameter_count
from liar_ext.checkpoint.shards import ShardWriter, TensorSpec
from liar_ext.checkpoint.writer import check_output, copy_other_files, output_folder, write_json
from liar_ext.depth.config import count_of, remapped
from liar_ext.depth.surgery import check_places, layer_list
from liar_ext.environment import environment
from liar_ext.errors import InputError
from liar_ext.models import layout
from liar_ext.report.schema import FILE, LAYERS, calibration_of

VERSION = 1


def parse_layers(text: str, option: str = "--drop-layers") -> tuple[int, ...]:
    """`3`, `3,7`, `20-27` and combinations of these: indices of layers, from 0.

    Raises:
        InputError: it is something else, or names a layer twice.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise InputError(f"{option} {text}: must be layers from 0, e.g. 20-27 or 3,7")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) != len(found):
        raise InputError(f"{option} {text}: names a layer twice")
    return tuple(sorted(found))


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
    kept = [layer for layer in range(count) if layer not in set(dropped)]
    if not kept:
        raise InputError(f"--drop-layers: all {count} layers; keep at least one")
    config = remapped(reader.config, kept)
    dense, model = layout.empty(reader.config), layout.empty(config)
    path, layers = layer_list(dense)
    check_places(path, layers, kept, model, {})
    left_over = reader.bind(dense)
    before = parameter_count(dense), reader.bytes()
    reader.keep_layers(path, kept)
    reader.bind(model)
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
            "warnings": _warnings(left_over, type(dense).__name__),
            "seconds": time.perf_counter() - started,
            "config": config,
            "environment": environment(),
        }
        write_json(made / "config.json", config)
        write_json(made / FILE, report)
        (made / "README.md").write_text(_card(report), encoding="utf-8")
    return report


def _warnings(left_over: Sequence[str], name: str) -> list[str]:
    if not left_over:
        return []
    return [
        f"{len(left_over)} tensors of the source are no part of {name} and were left out, first "
        f"{left_over[0]}"
    ]


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

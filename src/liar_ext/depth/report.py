"""The report and the model card of a checkpoint whose layers were left out, merged, inserted or
replaced."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from liar_ext.checkpoint.reader import parameter_count
from liar_ext.environment import environment
from liar_ext.models import layout
from liar_ext.report.front_matter import front_matter, library_of
from liar_ext.report.markdown import plain
from liar_ext.report.schema import FILE, LAYERS
from liar_ext.report.text import short_name

VERSION = 1


def layer_report(
    source: str | Path,
    *,
    layers: Mapping[str, Any],
    before: tuple[int, int],
    model: PreTrainedModel,
    bytes_after: int,
    config: dict[str, Any],
    calibration: dict[str, Any] | None,
    warnings: Sequence[str],
    seconds: float,
    device: torch.device | None = None,
    **own: Any,
) -> dict[str, Any]:
    """What every command on whole layers says of its result, as JSON data.

    Args:
        source: as the user named it; layers: which went where.
        before: parameters and bytes of the source; model: the result, also on `meta`.
        bytes_after: of its tensors; config: its `config.json`.
        calibration: the text that its weights have seen; None where there is none.
        own: what only this command says.
    """
    return {
        "version": VERSION,
        "kind": LAYERS,
        "source": str(source),
        "date": datetime.date.today().isoformat(),
        "layers": dict(layers),
        "totals": {
            "parameters_before": before[0],
            "parameters_after": parameter_count(model),
            "bytes_before": before[1],
            "bytes_after": bytes_after,
        },
        **own,
        "calibration": calibration,
        "warnings": list(warnings),
        "seconds": seconds,
        "config": config,
        "environment": environment(device),
    }


def layer_card(report: Mapping[str, Any], tags: Sequence[str], what: str, body: str) -> str:
    """`README.md` of such a checkpoint.

    Args:
        tags: of what was done, for the hub.
        what: behind the source's name in the title; body: what was done and is known of it.
    """
    totals = report["totals"]
    loader = (
        "liar_ext.load" if layout.KEY in report["config"] else "transformers' `from_pretrained`"
    )
    return (
        front_matter(report, tags, library_of(report["config"]))
        + f"\n# {plain(short_name(report['source']))} {what}\n\n"
        f"{body}\n\n"
        f"{totals['parameters_before']:,} parameters before, {totals['parameters_after']:,} after. "
        f"Loads with {loader}.\n\n"
        f"Made by liar-ext {report['environment']['liar_ext']}; `{FILE}` has the rest:\n\n"
        f"```json\n{json.dumps(report['layers'])}\n```\n"
    )

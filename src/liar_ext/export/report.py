"""The report and the model card of an exported folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liar_ext.environment import environment
from liar_ext.report.front_matter import front_matter
from liar_ext.report.markdown import plain
from liar_ext.report.schema import EXPORTED, FILE, calibration_of, read_data
from liar_ext.report.text import short_name

VERSION = 1


def export_report(
    source: str | Path,
    folder: Path,
    form: str,
    *,
    totals: Mapping[str, int],
    config: Mapping[str, Any],
    warnings: Sequence[str],
    seconds: float,
    **own: Any,
) -> dict[str, Any]:
    """What `liar export` says of its result, as JSON data.

    Args:
        source: as the user named it; folder: where it is; form: the format.
        totals: parameters and bytes before and after; config: the `config.json` of the result.
        own: what only this format says.
    """
    return {
        "version": VERSION,
        "kind": EXPORTED,
        "format": form,
        "source": str(source),
        "date": datetime.date.today().isoformat(),
        "totals": dict(totals),
        **own,
        # of the pruning before
        "calibration": calibration_of(folder),
        "warnings": list(warnings),
        "seconds": seconds,
        "config": dict(config),
        "environment": environment(),
        "source_report": read_data(folder) if (folder / FILE).exists() else None,
    }


def export_card(
    report: Mapping[str, Any], tags: Sequence[str], library: str | None, what: str, body: str
) -> str:
    """`README.md` of such a folder.

    Args:
        tags: of the format, for the hub; library: what loads it there, None where there is none.
        what: behind the source's name in the title; body: what it is, and how it is loaded.
    """
    totals = report["totals"]
    return (
        front_matter(report, ("pruned", *tags), library)
        + f"\n# {plain(short_name(report['source']))}, {what}\n\n"
        f"{body}\n\n"
        f"{totals['parameters_before']:,} parameters before, {totals['parameters_after']:,} "
        f"after.\n\n"
        f"Made by liar-ext {report['environment']['liar_ext']}; `{FILE}` has the rest, with the "
        f"report of the pruning as `source_report`:\n\n"
        f"```json\n{json.dumps(report['export'])}\n```\n"
    )

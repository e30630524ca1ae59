"""The YAML in front of a model card, by which the hub knows what a folder is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from liar_ext.report.loading import auto_class, base_model_type
from liar_ext.report.text import is_hub_id

TRANSFORMERS, OWN = "transformers", "liar-ext"


def front_matter(
    report: Mapping[str, Any],
    tags: Sequence[str],
    library: str | None,
) -> str:
    """Library, base model and tags, between lines of dashes; the last line has its end.

    Args:
        report: what `liar_report.json` says: its `config`, and its `source`, which is the base
            model where it is on the hub. Of a folder on this machine it is what that was made
            from, if its own report is inside (`source_report`); paths are not published.
        tags: what was done; `liar-ext` and the family come by themselves.
        library: what loads the folder; None where nothing on the hub has a name for that.
    """
    config = report["config"]
    lines = ["---"]
    if library is not None:
        lines.append(f"library_name: {library}")
    if library != OWN and auto_class(config) == "AutoModelForCausalLM":
        lines.append("pipeline_tag: text-generation")
    before = report.get("source_report") or {}
    base = next((s for s in (report["source"], before.get("source", "")) if is_hub_id(s)), None)
    # a JSON string is a YAML string, whatever it holds
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append("tags:")
    lines += [f"- {json.dumps(tag)}" for tag in ("liar-ext", *tags, base_model_type(config))]
    return "\n".join([*lines, "---", ""])


def library_of(config: Mapping[str, Any]) -> str:
    """What loads a checkpoint with this `config.json`."""
    return OWN if "liar_ext" in config else TRANSFORMERS

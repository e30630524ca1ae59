"""`liar trace SRC`: the Sites of a model, found by running its layers without weights."""

from __future__ import annotations

import argparse
from typing import Any

from liar_ext.errors import InputError

DESCRIPTION = """Find what can be pruned in SRC from its config.json alone: which linear's columns
are made by which rows of which others, in units that live or die together. Every Site is proved on
the model's own code at its real widths; no weights are read. `liar prune --trace` uses the result
where the family has no adapter."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "trace", help="find what can be pruned by running the layers", description=DESCRIPTION
    )
    parser.add_argument("source", metavar="SRC", help="folder or hub id; config.json is enough")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from liar_ext.checkpoint.load import resolve
    from liar_ext.checkpoint.reader import CONFIG, read_config
    from liar_ext.models import layout
    from liar_ext.tracing import trace

    folder = resolve(arguments.source, config_only=True)
    data = read_config(folder)
    if layout.KEY in data:
        raise InputError(
            f"{folder / CONFIG}: pruned already, to shapes of its own; trace the dense one"
        )
    found = trace(layout.config_object(data)).to_json()
    result = {"source": arguments.source, **found}
    if not arguments.json:
        print("\n".join(lines(result)))
    return result


def lines(found: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    kind = "decoder" if found["decoder"] else "encoder"
    shown = [
        f"{found['source']}: {found['model_type']}, {kind}, {found['depth']} layers "
        f"{found['layer_class']} at {found['backbone']}.{found['layers']}"
    ]
    for site in found["sites"]:
        each = site["columns_per_unit"]
        shown += [
            f"{site['kind']}: {site['consumer']}, {site['units']:,} units of {each:,} "
            f"column{'s' * (each > 1)}",
            f"  made by: {', '.join(producer_name(entry) for entry in site['producers'])}",
            f"  {_loader(site)}; {_adapter(found['model_type'], site['adapter_agrees'])}",
        ]
    return [*shown, *(f"no Site: {reason}" for reason in found["refused"].values())]


def _loader(site: dict[str, Any]) -> str:
    if site["config_fields"] is None:
        return "no config field states its width: liar_ext.load"
    return f"stated by {', '.join(site['config_fields'])}: stock where all layers are equal"


def _adapter(model_type: str, agrees: bool | None) -> str:
    if agrees is None:
        return f"{model_type} has no adapter: --trace"
    return f"the {model_type} adapter {'agrees' if agrees else 'DIFFERS'}"


def producer_name(producer: dict[str, Any]) -> str:
    """Its path, and which part of it where it is fused: `c_attn [1 of 3]`, `qkv [1-4 of 6]`."""
    if producer["segments"] == 1:
        return str(producer["path"])
    first, last = producer["segment"] + 1, producer["segment"] + producer["length"]
    which = f"{first}" if first == last else f"{first}-{last}"
    return f"{producer['path']} [{which} of {producer['segments']}]"

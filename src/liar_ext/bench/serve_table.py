"""What `liar bench serve` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from liar_ext.cli.output import print_table
from liar_ext.report.text import NONE, count, duration, latency, size

NAMES = {"prefill": "prefill", "decode": "a token"}


def print_result(result: Mapping[str, Any]) -> None:
    """The models, a table of each workload, and why speed-ups are less than sizes promise."""
    device, dtype = result["environment"]["device"], result["entries"][0]["dtype"]
    print(f"{device}, {dtype}, threads {result['environment']['threads']}; medians of rounds")
    print_table(models(result))
    for work in dict.fromkeys((e["batch"], e["prompt"]) for e in result["entries"]):
        own = [e for e in result["entries"] if (e["batch"], e["prompt"]) == work]
        print_table(workload(own))
    for line in reasons(result):
        print(line)


def models(result: Mapping[str, Any]) -> Table:
    """Sizes and loading, the dense model first."""
    table = Table(box=SIMPLE)
    table.add_column("model")
    for name in ("parameters", "of dense", "not in layers", "files", "loads cold", "warm"):
        table.add_column(name, justify="right")
    dense = result["models"][0]["parameters"]
    for own in result["models"]:
        parts = own["parts"]
        fixed = (parts["embeddings"] + parts["head"]) / own["parameters"]
        loads = [
            duration(own[name]) if own.get(name) is not None else NONE
            for name in ("load_s", "load_warm_s")
        ]
        table.add_row(
            own["name"],
            count(own["parameters"]),
            f"{own['parameters'] / dense:.1%}",
            f"{fixed:.0%}",
            size(own["file_bytes"]),
            *loads,
        )
    return table


def workload(entries: list[dict[str, Any]]) -> Table:
    """Times of one batch and length; a speed-up with the interval of its median."""
    first = entries[0]
    decoder = first["kind"] == "decoder"
    what = "a prompt" if decoder else "a sentence"
    new = f", {first['new_tokens']} new" if decoder else ""
    modes = {own["mode"] for own in entries}
    mode = "" if len(modes) > 1 else f", {first['mode']}"
    table = Table(
        title=f"batch {first['batch']}, {first['prompt']} tokens {what}{new}{mode}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
    )
    table.add_column("model")
    rest = ("a token", "speed-up", "tokens/s") if decoder else ("sentences/s",)
    for name in ("prefill" if decoder else "forward", "speed-up", *rest, "memory"):
        table.add_column(name, justify="right")
    for own in entries:
        name = f"{own['name']}\n{own['mode']}" if len(modes) > 1 else own["name"]
        table.add_row(name, *cells(own), size(own["peak_memory_bytes"]))
    reasons = [f"{e['name']}, {e['mode']}: {e['reason']}" for e in entries if e["reason"]]
    table.caption = "\n".join(reasons) or None
    return table


def cells(entry: Mapping[str, Any]) -> list[str]:
    """Times, ratios and the rate of one row."""
    found = []
    for phase in ("prefill", "decode") if entry["kind"] == "decoder" else ("prefill",):
        own = entry[f"{phase}_s"]
        found += [latency(own["p50"]) if own else NONE, faster(entry, phase)]
    if entry["kind"] == "decoder":
        rate = entry["tokens_per_s"]
    else:
        rate = entry["sentences_per_s"] and entry["sentences_per_s"]["p50"]
    return [*found, NONE if rate is None else f"{rate:,.4g}"]


def faster(entry: Mapping[str, Any], phase: str) -> str:
    """`1.42`, and `1.40-1.44` below; nothing for the dense model."""
    if entry["speedup"] is None:
        return ""
    own = entry["speedup"][phase]
    return f"{own['median']:.2f}\n{own['low']:.2f}-{own['high']:.2f}"


def reasons(result: Mapping[str, Any]) -> list[str]:
    """Lines that say why something is less faster than smaller."""
    return [
        f"{e['name']}, {e['mode']}, batch {e['batch']}, {e['prompt']} tokens, "
        f"{NAMES[phase]}: {text}"
        for e in result["entries"]
        for phase, text in ((e["speedup"] or {}).get("why") or {}).items()
        if text is not None
    ]

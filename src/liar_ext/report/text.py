"""Numbers and names as the model card, the HTML report and the plan print them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NONE = "–"


def budgeted(recipe: Mapping[str, Any]) -> str:
    """What the sparsity of a recipe counts."""
    names = {"flops": "FLOPs", "latency": "measured time"}
    return names.get(recipe.get("budget", ""), "parameters")


def count(value: float | None) -> str:
    """1234567 -> `1.23 M`; below ten thousand in full."""
    if value is None:
        return NONE
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale and abs(value) >= 1e4:
            return f"{value / scale:.3g} {letter}"
    return f"{value:,.0f}"


def parameters(value: float | None) -> str:
    """As `count`, with the B that model sizes are quoted in."""
    return count(value).replace(" G", " B")


def size(value: float | None) -> str:
    """Bytes: 1536 -> `1.5 KiB`."""
    if value is None:
        return NONE
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:,.4g} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    """0.3 -> `30.0 %`."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, exponents only where they are shorter to read."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}g}"


def ridge(value: float | str | None) -> str:
    """What a recipe asks for: a number, or `auto` with what that means."""
    return "auto (chosen on held-out tokens)" if value == "auto" else number(value)  # type: ignore[arg-type]


def duration(seconds: float | None) -> str:
    """75.2 -> `1 min 15 s`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def time_left(done: int, total: int, seconds: float) -> str:
    """`, about 3 min 5 s left`, from how long what is done took; empty at the end."""
    if not done or done >= total:
        return ""
    return f", about {duration(seconds / done * (total - done))} left"


def latency(seconds: float | None) -> str:
    """0.00123 -> `1.23 ms`."""
    if seconds is None:
        return NONE
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def workload(table: Mapping[str, Any]) -> str:
    """What was measured, in words, of a file or of what a report says of it."""
    work = table["workload"]
    size = "one sequence" if work["batch"] == 1 else f"{work['batch']} sequences"
    what = {
        "prefill": f"{size} of {work['seq_len']:,} tokens",
        "decode": f"the next token of {size} after {work['seq_len']:,}",
    }[work["mode"]]
    return f"{what}, {table['dtype']}, {table['device']}"


def change(before: float | None, after: float | None) -> str:
    """Relative change with its sign: (100, 70) -> `−30.0 %`."""
    if not before or after is None:
        return NONE
    relative = 100 * (after / before - 1)
    return f"{'−' if relative < 0 else '+'}{abs(relative):.1f} %"


def signed(difference: Mapping[str, Any]) -> str:
    """A difference of figures with its interval, as `Difference.to_json`: `+2.04 (+1.6 to +2.5)`.

    The bounds have as many decimals as the value, so that they can be compared by eye.
    """
    value, interval = difference["value"], difference["confidence_interval"]
    bounds = [] if interval is None else list(interval)
    large = max(abs(bound) for bound in (value, *bounds))
    form = "+.4g" if large >= 1e4 or large < 0.01 else "+.4f" if large < 0.1 else "+.2f"
    shown, *ends = (f"{bound:{form}}" for bound in (value, *bounds))
    return f"{shown} ({' to '.join(ends)})" if ends else shown


def layers(indices: Sequence[int]) -> str:
    """[3, 20, 21, 22] -> `3, 20-22`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def is_hub_id(source: str) -> bool:
    """`owner/name` that is no path on this machine."""
    plain = source.replace("-", "").replace("_", "").replace(".", "").replace("/", "", 1)
    named = source.count("/") == 1 and not source.startswith((".", "/", "~", "-"))
    return named and plain.isalnum() and plain.isascii() and not Path(source).exists()


def short_dataset(spec: str) -> str:
    """The same of what is evaluated on, with the task or the protocol in front of `=`."""
    name, equals, source = spec.partition("=")
    return f"{name}={short_name(source)}" if equals and source else short_name(spec)


def short_name(source: str) -> str:
    """A hub id as it is; of a path only the last part, because outputs are published."""
    return source if is_hub_id(source) else Path(source).name or source

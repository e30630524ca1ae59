"""The section about speed and memory, from what `liar bench serve` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from liar_ext.report import plots_measured
from liar_ext.report.material import finite
from liar_ext.report.outputs import Output
from liar_ext.report.page import (
    Html,
    details,
    element,
    figure,
    join,
    paragraph,
    plots,
    records,
    table,
)
from liar_ext.report.text import NONE, latency, number, parameters, size

WORKLOAD = ("kind", "mode", "dtype", "batch", "prompt", "new_tokens")
VERSIONS = ("torch", "transformers", "threads")
MOST_FIGURES = 4  # workloads with plots; the table has all


def measured(serves: Sequence[Mapping[str, Any]], outputs: Sequence[Output]) -> Html:
    """Prefill, decode, memory and files of each model, by what it was asked to do."""
    return join(_one(serve, outputs, place) for place, serve in enumerate(serves))


def verdict(serves: Sequence[Mapping[str, Any]], output: Output) -> list[tuple[str, str, str]]:
    """A card: how fast one output is in the first workload that has it."""
    for serve in serves:
        for entries in _workloads(serve["entries"]).values():
            own = next((e for e in entries if output.is_of(str(e.get("path", "")))), None)
            if own is None:
                continue
            dense = next((e for e in entries if output.from_source(str(e.get("path", "")))), None)
            for label, value, less in (
                ("Tokens per second", _rate, False),
                ("Time of one forward", _prefill, True),
            ):
                speed = value(own)
                if speed is None:
                    continue
                show = latency if less else number
                before = None if dense is None else value(dense)
                note = _told(own)
                if before:
                    ratio = before / speed if less else speed / before
                    note = f"{show(before)} dense, {ratio:.2f} times as fast; {note}"
                return [(label, show(speed), note)]
    return []


def _one(serve: Mapping[str, Any], outputs: Sequence[Output], place: int) -> Html:
    entries = [{**entry, "label": _label(entry, outputs)} for entry in serve["entries"]]
    known = serve.get("environment")
    environment = known if isinstance(known, Mapping) else {}
    stated = ", ".join(f"{k} {environment[k]}" for k in VERSIONS if environment.get(k))
    device = environment.get("device") or serve.get("device") or "an unknown device"
    parts: list[str] = [paragraph(f"Measured on {device}. {stated}".strip(), class_="soft")]
    for at, own in enumerate(_workloads(entries).values()):
        parts.append(element("h3", _told(own[0])))
        if at < MOST_FIGURES:
            name = f"serve-{place}-{at}"
            parts.append(plots([_rates(own, name), _prefills(own, name), _memories(own, name)]))
        parts.append(
            table(
                f"{_told(own[0])}: medians, with the 20th and 80th percentile where known.",
                [
                    "model",
                    "prefill",
                    "decode, a token",
                    "tokens/s",
                    "peak memory",
                    "files",
                    "loading",
                    "parameters",
                    "times as fast",
                ],
                [_row(entry) for entry in own],
            )
        )
    if environment:
        parts.append(details("Environment", records("Of these timings.", environment)))
    return join(parts)


def _label(entry: Mapping[str, Any], outputs: Sequence[Output]) -> str:
    path = str(entry.get("path", ""))
    own = next((output.label for output in outputs if output.is_of(path)), None)
    if own is None and any(output.from_source(path) for output in outputs):
        return f"{entry['name']} (dense)" if "dense" not in entry["name"] else str(entry["name"])
    return own or str(entry["name"])


def _workloads(entries: Sequence[Mapping[str, Any]]) -> dict[Any, list[Mapping[str, Any]]]:
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(tuple(str(entry.get(name)) for name in WORKLOAD), []).append(entry)
    return found


def _told(entry: Mapping[str, Any]) -> str:
    """What was asked, in words; a missing field is not said."""
    parts = []
    if entry.get("batch") is not None:
        parts.append(f"batch {entry['batch']}")
    if entry.get("prompt") is not None:
        parts.append(f"{entry['prompt']} tokens in")
    if entry.get("new_tokens"):
        parts.append(f"{entry['new_tokens']} out")
    parts += [str(entry[name]) for name in ("dtype", "mode") if entry.get(name)]
    return ", ".join(parts) or "one workload"


def _rates(entries: Sequence[Mapping[str, Any]], name: str) -> Html:
    note = "Tokens written a second. Higher is better."
    return _figure(entries, _rate, "tokens per second", note, number, f"{name}-rate")


def _prefills(entries: Sequence[Mapping[str, Any]], name: str) -> Html:
    def milliseconds(entry: Mapping[str, Any]) -> float | None:
        seconds = _prefill(entry)
        return None if seconds is None else 1e3 * seconds

    note = "Time of one forward over the whole input. Lower is better."
    plot = f"{name}-prefill"
    return _figure(entries, milliseconds, "prefill, ms", note, lambda v: f"{number(v)} ms", plot)


def _memories(entries: Sequence[Mapping[str, Any]], name: str) -> Html:
    largest = max((_memory(entry) or 0.0 for entry in entries), default=0.0)
    power, unit = (3, "GiB") if largest >= 1024**3 else (2, "MiB")

    def scaled(entry: Mapping[str, Any]) -> float | None:
        memory = _memory(entry)
        return None if memory is None else memory / 1024**power

    label, note = f"peak memory, {unit}", "Memory at its highest. Lower is better."
    return _figure(entries, scaled, label, note, lambda v: f"{number(v)} {unit}", f"{name}-memory")


def _figure(
    entries: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
    label: str,
    note: str,
    show: Callable[[float], str],
    name: str,
) -> Html:
    """Bars of those entries that have the value; empty where none has."""
    rows = [
        {"label": entry["label"], "value": found, "dense": "dense" in entry["label"]}
        for entry in entries
        if (found := value(entry)) is not None
    ]
    return figure(plots_measured.bars(rows, label, name, show), note) if rows else Html("")


def _row(entry: Mapping[str, Any]) -> list[str]:
    rate, load = _rate(entry), entry.get("load_s")
    speedup = entry.get("speedup")
    told = ""
    if isinstance(speedup, Mapping):
        told = ", ".join(
            f"{key.replace('_', ' ')} {ratio}"
            for key, value in speedup.items()
            if (ratio := _ratio(value))
        )
    return [
        entry["label"],
        _spread(entry.get("prefill_s")),
        _spread(entry.get("decode_s")),
        number(rate),
        size(_number(entry.get("peak_memory_bytes"))),
        size(_number(entry.get("file_bytes"))),
        latency(_number(load)),
        parameters(_number(entry.get("parameters"))),
        told or NONE,
    ]


def _ratio(value: Any) -> str:
    """A measured speed-up, with its interval; empty for what is none."""
    if not isinstance(value, Mapping) or not finite(value.get("median")):
        return ""
    ends = [value.get("low"), value.get("high")]
    around = f" ({ends[0]:.2f} to {ends[1]:.2f})" if all(map(finite, ends)) else ""
    return f"{value['median']:.2f}{around}"


def _spread(times: Any) -> str:
    if not isinstance(times, Mapping) or not finite(times.get("p50")):
        return NONE
    ends = [times.get("p20"), times.get("p80")]
    around = f" ({latency(ends[0])} to {latency(ends[1])})" if all(map(finite, ends)) else ""
    return f"{latency(times['p50'])}{around}"


def _number(value: Any) -> float | None:
    return float(value) if finite(value) else None


def _median(entry: Mapping[str, Any], key: str) -> float | None:
    times = entry.get(key)
    return _number(times.get("p50")) if isinstance(times, Mapping) else None


def _prefill(entry: Mapping[str, Any]) -> float | None:
    return _median(entry, "prefill_s")


def _rate(entry: Mapping[str, Any]) -> float | None:
    return _number(entry.get("tokens_per_s"))


def _memory(entry: Mapping[str, Any]) -> float | None:
    return _number(entry.get("peak_memory_bytes"))

"""A row of `liar bench serve`: one model at one workload in one mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from liar_ext.bench.measure import quantiles, rank_interval
from liar_ext.bench.serve_models import Served
from liar_ext.bench.serve_prompts import Work
from liar_ext.bench.serve_work import Ceilings, why, work_of

# what a round is split into, and the whole of a decoder's
PHASES = ("prefill", "decode", "generate")
Rounds = Mapping[str, Sequence[float]]


def whole(rounds: Mapping[str, list[float]], work: Work) -> dict[str, list[float]]:
    """The rounds, with the seconds of all of a decoder's."""
    if not work.new_tokens:
        return dict(rounds)
    pairs = zip(rounds["prefill"], rounds["decode"], strict=True)
    return {**rounds, "generate": [p + (work.new_tokens - 1) * d for p, d in pairs]}


def entry(
    served: Served, work: Work, mode: str, loading: Mapping[str, Any], reason: str | None
) -> dict[str, Any]:
    """What is known without a measurement; `reason` is why there is none."""
    return {
        "name": served.name,
        "path": served.outline.source.given,
        "random": served.outline.source.random,
        "kind": served.outline.kind,
        "mode": mode,
        "dtype": str(served.model.dtype).removeprefix("torch."),
        **work.to_json(),
        **{f"{phase}_s": None for phase in PHASES},
        **dict.fromkeys(("tokens_per_s", "generate_tokens_per_s", "sentences_per_s")),
        "peak_memory_bytes": None,
        "process_peak_bytes": None,
        "file_bytes": served.file_bytes,
        "load_s": loading.get("load_s"),
        "load_warm_s": loading.get("load_warm_s"),
        "parameters": served.parameters,
        **dict.fromkeys(("compile_s", "check", "bound", "speedup", "reason")),
        "reason": reason,
    }


def measured(
    row: dict[str, Any], served: Served, rounds: Rounds, cache_bytes: float, ceilings: Ceilings
) -> None:
    """Add times, rates, and how near they are to what the device can do."""
    seconds = {phase: quantiles(own) for phase, own in rounds.items()}
    row |= {f"{phase}_s": own for phase, own in seconds.items()}
    batch, new = row["batch"], row["new_tokens"]
    if new:
        row["tokens_per_s"] = _rounded(batch / seconds["decode"]["p50"])
        row["generate_tokens_per_s"] = _rounded(batch * new / seconds["generate"]["p50"])
    else:
        row["sentences_per_s"] = {
            # the slow rounds have the low rates
            name: _rounded(batch / seconds["prefill"][other])
            for name, other in (("p20", "p80"), ("p50", "p50"), ("p80", "p20"))
        }
    work = work_of(served, batch, row["prompt"], new, cache_bytes)
    if work is not None:
        row["bound"] = {phase: ceilings.bound(own) for phase, own in work.items()}
        for phase, own in row["bound"].items():
            own["of_bound"] = own["seconds"] / seconds[phase]["p50"]


def compare(
    row: dict[str, Any], rounds: Rounds, dense: Mapping[str, Any], dense_rounds: Rounds
) -> None:
    """Add how many times as fast as the dense model of the same rounds it is."""
    ratio = dense["parameters"] / row["parameters"]
    found: dict[str, Any] = {"parameters": ratio}
    for phase, own in rounds.items():
        ratios = [d / s for d, s in zip(dense_rounds[phase], own, strict=True)]
        found[phase] = {"median": median(ratios), **rank_interval(ratios)}
    row["speedup"] = found
    found["why"] = {phase: why(phase, row, dense, ratio) for phase in rounds if phase != "generate"}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

"""A plan as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from liar_ext.report.text import (
    budgeted,
    change,
    count,
    duration,
    latency,
    parameters,
    percent,
    size,
    workload,
)


def render(plan: Mapping[str, Any]) -> RenderableType:
    """A plan as rich tables."""
    about = "" if plan["exact"] else "about "
    result = _table("before", "after", "change")
    if plan["depth"] is not None:
        before, after = plan["depth"]["before"], plan["depth"]["after"]
        result.add_row("layers", str(before), str(after), change(before, after))
    for label, key, show in (
        ("parameters", "parameters", parameters),
        ("weight files", "bytes", size),
        ("FLOPs per token", "flops_per_token", count),
    ):
        before, after = plan[key]["before"], plan[key]["after"]
        result.add_row(label, show(before), about + show(after), change(before, after))
    if plan["latency"] is not None:
        before, after = plan["latency"]["before"], plan["latency"]["after"]
        result.add_row(
            "latency of the targeted",
            latency(before),
            about + latency(after),
            change(before, after),
        )
    for kind in dict.fromkeys(site["kind"] for site in plan["sites"]):
        own = [site for site in plan["sites"] if site["kind"] == kind]
        units = [[site[f"units_{when}"] for site in own] for when in ("before", "after")]
        result.add_row(
            f"{kind} units in {len(own)} layers",
            _listed(units[0]),
            about + _listed(units[1]),
            change(sum(units[0]), sum(units[1])),
        )
    flops, seconds = plan["flops"], plan["seconds"]
    cost = _table("FLOPs", "time")
    if flops["choice"]:
        cost.add_row("choosing layers", count(flops["choice"]), duration(seconds["choice"]))
    cost.add_row("forward", count(flops["forward"]), duration(seconds["forward"]))
    if flops["gradients"]:
        cost.add_row("gradients", count(flops["gradients"]), duration(seconds["gradients"]))
    if flops["learning"]:
        cost.add_row("learning", count(flops["learning"]), duration(seconds["learning"]))
    cost.add_row("Gram", count(flops["gram"]), duration(seconds["gram"]))
    cost.add_row("solve", count(flops["solve"]), duration(seconds["solve"]))
    if flops["search"]:
        cost.add_row("search", count(flops["search"]), duration(seconds["search"]))
    cost.add_row("residual", count(flops["residual"]), duration(seconds["residual"]))
    cost.add_row("together, about", "", duration(seconds["total"]))
    own, disk = plan["memory"], plan["disk"]
    memory = _table("memory")
    for key, value in own.items():
        if not key.endswith("peak"):
            memory.add_row(key.replace("_", " "), size(value))
    memory.add_row("together", size(own["peak"]))
    space = _table("disk")
    for key in ("output", "snapshots", "levels", "scratch", "moments", "total"):
        if disk.get(key):
            space.add_row("together" if key == "total" else key, size(disk[key]))
    computed: list[RenderableType] = []
    if _computes(plan):
        computed = [_heading("The compression itself"), cost]
    return Group(
        _heading(f"{plan['source']} after pruning"),
        result,
        *computed,
        _heading(f"Most memory, {_where(plan)}"),
        memory,
        _heading("Disk"),
        space,
        Text("\n".join(_lines(plan, about))),
    )


def _computes(plan: Mapping[str, Any]) -> bool:
    """Whether anything is computed at all."""
    return any(plan["flops"].values())


def _lines(plan: Mapping[str, Any], about: str) -> list[str]:
    data, loader, asked = plan["calibration"], plan["loader"], plan["sparsity"]["asked"]
    waiting, phases = plan["hidden_states"], plan["phases"]
    counted, reached = budgeted(plan["recipe"]), percent(plan["sparsity"]["achieved"])
    why = f", because {loader['why_not_stock']}" if loader["why_not_stock"] else ""
    narrows, waits = bool(plan["sites"]), bool(data["tokens"])
    return [
        *([f"sparsity: {percent(asked)} of {counted} asked, {about}{reached} reached"] * narrows),
        *([f"latency: predicted for {workload(plan['latency'])}"] if plan["latency"] else []),
        f"loads with {loader['with']}{why}",
        f"calibration: {data['tokens']:,} tokens; {data['minimum']:,} needed, "
        f"{data['recommended']:,} recommended"
        if waits
        else "calibration: none is needed",
        *(
            [f"memory of the host: {size(plan['memory']['host_peak'])}, {phases['host_peak']}"]
            if phases["host_peak"] != phases["peak"]
            else []
        ),
        f"disk: {plan['disk']['folder']} has {size(plan['disk']['free'])} free",
        *(
            [
                f"hidden states and paused forwards: {size(waiting['bytes'])}, {waiting['place']}, "
                f"because {waiting['why']}"
            ]
            * waits
        ),
        *([f"less memory: {phases['lower']}"] if phases["lower"] else []),
        *([_time(plan["seconds"])] if plan["seconds"]["rates"] and _computes(plan) else []),
        *(
            f"warning: {found['problem']}"
            for found in (data, phases, plan["disk"])
            if found["problem"]
        ),
        *plan["notes"],
    ]


def _table(*heads: str) -> Table:
    table = Table("")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _listed(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _where(plan: Mapping[str, Any]) -> str:
    each = "" if plan["ranks"] == 1 else f" of each of {plan['ranks']} processes"
    return f"{plan['phases']['peak']}{each}"


def _time(seconds: Mapping[str, Any]) -> str:
    return (
        f"time: FLOPs of one process at the rates of {seconds['device']} measured just now; "
        "reading, writing and memory-bound work come on top"
    )

"""The roofline section of `docs/performance.md`: predicted, measured, and why they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# planning figures for a GPU that was not measured; the document says that they are assumed
ASSUMED = {"name": "an H200", "tflops": 790.0, "gbytes": 4300.0, "tokens": 32768}
SIZES = (4096, 11008, 14336, 28672)
TEXT = """\
## Roofline of the triangle

Predicted: the larger of `n² T` at the measured rate of a large product, and of reading `x` once and
reading and writing the triangle at the measured copy rate.

| device | n | T | dtype | bound by | predicted, ms | measured, ms | predicted / measured |
|---|---|---|---|---|---|---|---|"""
# the point at which a row needs an explanation
NEAR = 0.85
TILE = 128
# runnable processes for each thread of the benchmark: above this, some are not its own
BUSY = 1.3


def bound(
    columns: int, tokens: int, gflops: float, gbytes: float, products: int, width: int
) -> tuple[float, str]:
    """(ms, what bounds it): the triangle's products at the matmul rate, or the bytes it must move.

    Args:
        products: of each pair of values. width: bytes that are moved of each value of x.
    """
    compute = products * columns * columns * tokens / gflops / 1e6
    memory = (tokens * columns * width + 2 * 4 * columns * (columns + 1) / 2) / gbytes / 1e6
    return (compute, "compute") if compute >= memory else (memory, "memory")


def predicted(data: dict[str, Any], row: dict[str, Any]) -> tuple[float, str]:
    """The bound of one row, from the ceilings of its own run."""
    rates, dtype = data["ceilings"], row["dtype"]
    matmul = rates["matmul_gflops"]
    shape = (row["n"], row["tokens"])
    if data["device"] == "cuda" and dtype == "float32" and "bfloat16" in matmul:
        # three planes: x is read, the planes are written and read, and six products are taken
        ms, by = bound(*shape, matmul["bfloat16"], rates["copy_gbytes"], 6, 4 + 6 + 6)
        return ms, f"{by}, as 6 bfloat16 products"
    return bound(*shape, matmul[dtype], rates["copy_gbytes"], 1, BYTES[dtype])


def roofline(grams: Sequence[dict[str, Any]]) -> list[str]:
    lines = [TEXT]
    reasons: dict[str, None] = {}
    measured_gpu = any(data["device"] == "cuda" for data in grams)
    for data in grams:
        for row in data["rows"]:
            if row["case"] != "triangle" or not row.get("chosen") or "ms" not in row:
                continue
            ms, by = predicted(data, row)
            reached = ms / row["ms"]
            lines.append(
                f"| {data['environment']['device']} | {row['n']} | {row['tokens']} "
                f"| {row['dtype']} | {by} | {ms:.4g} | {row['ms']:.4g} | {reached:.2f} |"
            )
            reasons |= dict.fromkeys(why(data, row, reached))
    if not measured_gpu:
        lines += assumed()
    if reasons:
        lines += ["", "Deviations:", "", *(f"- {reason}" for reason in reasons)]
    return lines


def assumed() -> list[str]:
    """What a GPU would need at least, until one was measured."""
    parts = []
    for columns in SIZES:
        gflops = ASSUMED["tflops"] * 1e3
        ms, by = bound(columns, ASSUMED["tokens"], gflops, ASSUMED["gbytes"], 1, 2)
        parts.append(f"{ms:.3g} ms for {columns} ({by})")
    return [
        "",
        "No GPU was measured. At an **assumed** "
        f"{ASSUMED['tflops']:g} TFLOP/s and {ASSUMED['gbytes']:g} GB/s, which is what",
        f"{ASSUMED['name']} may sustain in bfloat16, {ASSUMED['tokens']} tokens would take at "
        "least",
        ", ".join(parts) + ".",
    ]


def why(data: dict[str, Any], row: dict[str, Any], reached: float) -> list[str]:
    """The reasons for a row away from its prediction that its own JSON supports."""
    where = f"{data['environment']['device']}, {row['dtype']}"
    if reached > 1 / NEAR:
        path = (data.get("extension") or {}).get(row["dtype"])
        how = f"our C++ (`{path}`)" if path and row["variant"] == "cpu" else row["variant"]
        return [
            f"{where}: faster than predicted, because the library's product, which stands for the "
            f"processor there, is slower than what {how} reaches: it is no ceiling of the "
            "processor."
        ]
    if reached >= NEAR:
        return []
    found = []
    where += f", n = {row['n']}"
    # the file that the row is from: there may be one for each dtype
    own = next(part for part in data.get("parts", [data]) if row in part["rows"])
    load = max(
        own.get("machine", {}).get(when, {}).get("load_1min", 0) for when in ("before", "after")
    )
    if load > BUSY * own["environment"]["threads"]:
        found.append("the machine was busy with other work, see the load above")
    tiles = -(-row["n"] // TILE)
    count = tiles * (tiles + 1) // 2
    waste = 2 * count * TILE**2 / (row["n"] * (row["n"] + 1)) - 1
    if waste > 0.01:
        found.append(f"tiles of {TILE} on the diagonal are computed whole, {waste:.0%}")
    if units := data.get("multiprocessors"):
        waves = count / units
        idle = -(-count // units) / waves - 1
        if idle > 0.01:
            found.append(f"{waves:.1f} rounds of tiles on {units} multiprocessors, {idle:.0%}")
    better = [
        other["variant"]
        for other in data["rows"]
        if other["case"] == "triangle"
        and (other["n"], other["dtype"]) == (row["n"], row["dtype"])
        and other.get("ours")
        and other.get("share", 0) > row["share"]
    ]
    if better:
        found.append(f"`{better[0]}` does better in the same run")
    reasons = "; ".join(found) or "no reason that was measured"
    return [f"{where}, {1 / reached - 1:.0%} above the prediction: {reasons}."]

"""The table of cosines in `docs/performance.md`."""

from __future__ import annotations

from typing import Any

TEXT = """\
Cosines of the rows of two (T, d) tensors. Share: the bytes of both, each counted once, over the
measured rate of a large copy. × baseline: over `torch.nn.functional.cosine_similarity` of the same
dtype. Error: the largest one of a cosine. Half: every second row, by its index."""
HEAD = """\
| d | T | dtype | version | case | ms | GB/s | share | × baseline | error | MiB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def cosine_table(data: dict[str, Any]) -> list[str]:
    """Every row that has a time."""
    lines = [f"Measured ceiling: copy {data['ceilings']['copy_gbytes']:.3g} GB/s.", "", TEXT, ""]
    lines.append(HEAD)
    for row in data["rows"]:
        if "ms" not in row:
            continue
        name = f"**{row['variant']}**" if row.get("chosen") else f"`{row['variant']}`"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        peak = row.get("peak_bytes")
        lines.append(
            f"| {row['n']} | {row['tokens']} | {row['dtype']} | {name} | {row['case']} "
            f"| {row['ms']:.4g} | {row['gbytes']:.3g} | {row['bandwidth']:.2f} | {ratio} "
            f"| {row['error']:.1e} | {'' if peak is None else format(peak / 2**20, '.0f')} |"
        )
    return lines

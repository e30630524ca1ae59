"""Gaps between layers, each named by the layer below it, and what may stand in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from liar_ext.depth.config import PER_LAYER
from liar_ext.depth.surgery import settings
from liar_ext.errors import InputError


def default_gaps(count: int, added: int) -> tuple[int, ...]:
    """The last `added` gaps of a model of `count` layers, one layer for each.

    For half as many layers again these are the gaps from the middle to the end: 16 more for 32 go
    behind layers 15 to 30. No layer goes behind the last one, which has no second neighbour.

    Raises:
        InputError: there are not so many gaps.
    Source:
        LESA (Yang et al., 2025, arXiv 2502.13794) for that case; the rule for others is ours.
    """
    if not 1 <= added <= count - 1:
        raise InputError(
            f"--layers {added}: {count} layers have {max(count - 1, 0)} gaps, and each takes one "
            "layer; " + (f"give 1 to {count - 1}" if count > 1 else "there is nothing between")
        )
    return tuple(range(count - 1 - added, count - 1))


def check_gaps(gaps: Sequence[int], count: int) -> None:
    """Raises InputError unless these are gaps of a model of `count` layers."""
    if len(set(gaps)) != len(gaps):
        raise InputError(f"--insert {list(gaps)}: names a gap twice, and each takes one layer")
    if not gaps:
        raise InputError("--insert: no gap is named; give the layers to insert behind, e.g. 15-30")
    for gap in gaps:
        if not 0 <= gap < count - 1:
            has = f"0 to {count - 2}" if count > 1 else "none"
            raise InputError(
                f"--insert {gap}: there is no layer on both sides; the gaps of {count} "
                f"layer{'s' * (count != 1)}, by the layer below: {has}"
            )


def places(count: int, gaps: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """The layers of the grown model, as `remapped` takes them, and where the new ones are.

    Returns:
        for each layer of the result its source; a new one has that of the layer below it, whose
        kind it becomes. And by gap, the place of the new layer.
    """
    kept: list[int] = []
    new: dict[int, int] = {}
    for layer in range(count):
        kept.append(layer)
        if layer in gaps:
            new[layer] = len(kept)
            kept.append(layer)
    return kept, new


def check_neighbours(layers: nn.ModuleList, stated: Mapping[str, Any], gaps: Sequence[int]) -> None:
    """Whether the two layers beside each gap are of one kind; works on `meta`.

    Args:
        layers: of the source; stated: its config, with what the family derives from places.
    Raises:
        InputError: it names the gap and what differs.
    """
    for gap in gaps:
        if (what := _difference(layers, stated, gap)) is not None:
            alike = [g for g in range(len(layers) - 1) if _difference(layers, stated, g) is None]
            raise InputError(
                f"--insert {gap}: layers {gap} and {gap + 1} differ in {what}, and a layer between "
                "them would be of neither kind; gaps between layers of one kind: "
                f"{', '.join(map(str, alike)) or 'none'}"
            )


def _difference(layers: nn.ModuleList, stated: Mapping[str, Any], gap: int) -> str | None:
    below, above = layers[gap], layers[gap + 1]
    if type(below) is not type(above):
        return f"their class ({type(below).__name__}, {type(above).__name__})"
    for name in PER_LAYER:
        values = stated.get(name)
        if isinstance(values, list | tuple) and len(values) == len(layers):
            one, other = values[gap], values[gap + 1]
            if one != other:
                return f"{name} ({one}, {other})"
    shapes = [
        {n: tuple(t.shape) for n, t in layer.state_dict().items()} for layer in (below, above)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one, other = (found.get(name) for found in shapes)
        if one != other:
            return f"the shape of {name} ({one or 'missing'}, {other or 'missing'})"
    parts = dict(above.named_modules())
    for name, module in below.named_modules():
        mine, theirs = settings(module), settings(parts[name]) if name in parts else {}
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"{f'{name}.{key}'.lstrip('.')} ({mine.get(key)}, {theirs.get(key)})"
    return None

"""The config fields that state a Site's width, found by value and checked by building.

A field is one that holds the width now (or nothing, where the width is derived from others) and
with another width in it makes a model that has exactly the tensors of the pruned one, and whose
layer gives its consumer what the pruned one gives it. Of two fields, each has to make a difference
of its own. Without such fields the result needs this package's own loader.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from liar_ext.models import layout, linear
from liar_ext.tracing.attempt import REFUSALS
from liar_ext.tracing.dependence import Units
from liar_ext.tracing.probe import LayerProbe
from liar_ext.tracing.removal import same_columns
from liar_ext.tracing.stand_ins import Skeleton, skeleton


def stated_fields(
    dense: Skeleton, found: Units, probe: LayerProbe, config: PretrainedConfig
) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """The fields for the units of a consumer that is the same in every layer.

    Returns:
        name -> `units`, `columns` or `query_heads`, or None; and fields to state beside them.
    """
    units = found.columns.shape[0]
    # half of the units is a number that most configs accept, for heads as well
    keep = torch.arange(units // 2)
    wanted = _shapes(dense, found, keep)
    values = {
        "units": units,
        "query_heads": found.columns.numel() // found.head_dim,
        "columns": found.columns.numel(),
    }
    after = {what: size * keep.numel() // units for what, size in values.items()}
    for fields, beside in _guesses(config, found, values):
        changes = {name: after[what] for name, what in fields.items()} | beside
        if not _states(changes, config, wanted, found, probe, keep):
            continue
        alone = [{name: changes[name]} | beside for name in fields]
        if len(fields) == 1 or all(_matters(each, config, dense) for each in alone):
            return fields, beside
    return None, {}


def _matters(changes: Mapping[str, Any], config: PretrainedConfig, dense: Skeleton) -> bool:
    """Whether other tensors, or none, are made with them: a field that holds the same number by
    chance, as that of a token, makes no difference."""
    built = _built(changes, config)
    return built is None or layout.shapes_of(built.model) != layout.shapes_of(dense.model)


def _built(changes: Mapping[str, Any], config: PretrainedConfig) -> Skeleton | None:
    """What transformers makes of a config with other values in it, or None."""
    try:
        with _silent():
            return skeleton(type(config).from_dict(config.to_dict() | dict(changes)))
    except REFUSALS:
        return None


def _guesses(
    config: PretrainedConfig, found: Units, values: Mapping[str, int]
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Fields that hold a width or None: one, then two; with and without the head's width."""
    plain = {k: v for k, v in config.to_dict().items() if v is None or type(v) is int}
    kinds = ["units"] if found.spec.kind == "ffn" else ["units", "query_heads"]
    holding = [(name, what) for name, v in plain.items() for what in kinds if v == values[what]]
    if values["units"] == values["query_heads"]:
        holding = [(n, w) for n, w in holding if w == "units"]
    beside: list[dict[str, Any]] = [{}]
    if found.spec.kind == "heads":
        beside.append({"head_dim": found.head_dim})
        if config.to_dict().get("head_dim") == found.head_dim:
            # it may have been derived from what changes
            del beside[0]
    guesses = [dict([entry]) for entry in holding]
    if found.spec.kind == "ffn":
        # derived from others where it is not stated, as GPT-2's n_inner
        guesses += [{name: "units"} for name, value in plain.items() if value is None]
    else:
        pairs = itertools.combinations(holding, 2)
        # first, so that no count of heads is left behind that means nothing now
        guesses = [dict(pair) for pair in pairs if pair[0][0] != pair[1][0]] + guesses
    yield from ((fields, extra) for extra in beside for fields in guesses)


def _states(
    changes: Mapping[str, Any],
    config: PretrainedConfig,
    wanted: Mapping[str, tuple[int, ...]],
    found: Units,
    probe: LayerProbe,
    keep: torch.Tensor,
) -> bool:
    built = _built(changes, config)
    if built is None or layout.shapes_of(built.model) != wanted:
        return False
    try:
        smaller = LayerProbe(built.layers[0], lambda count: built.call(count, 0))
        return same_columns(probe, smaller, found, keep) is None
    except REFUSALS:
        return False


@contextmanager
def _silent() -> Iterator[None]:
    """Without what transformers says of configs that are only tried."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _shapes(dense: Skeleton, found: Units, keep: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the headless model whose layers all lost the same units of this consumer."""
    shapes = layout.shapes_of(dense.model)
    kept = keep.numel()
    lengths = {found.spec.consumer: None} | {p: r[keep].numel() for p, r in found.rows.items()}
    for index in range(len(dense.layers)):
        for path, rows in lengths.items():
            name = f"{dense.path}.{index}.{path}"
            module = dense.model.get_submodule(name)
            out, into = linear.weight(module).shape
            if rows is None:
                into = found.columns[:kept].numel()
            else:
                out = rows
                if linear.bias(module) is not None:
                    shapes[f"{name}.bias"] = (out,)
            transposed = not isinstance(module, nn.Linear)
            shapes[f"{name}.weight"] = (into, out) if transposed else (out, into)
    return shapes

"""Units removed, against columns looked away from: what must be equal before a Site is one.

A linear gives what its rows give, so a linear with fewer rows is one whose output lacks them. With
the producers' outputs cut to the kept units, the module's own code must make the kept columns of
the consumer's input and nothing else, for any values. That needs no weights; it needs the integers
in which modules keep their own width (`num_heads`), or which they read of their config in a
forward; they are found here: by value, and the fewest with which all is equal.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from liar_ext.errors import InputError
from liar_ext.models.own_config import PREFIX, Asked
from liar_ext.models.site import Site, SiteSpec
from liar_ext.tracing.dependence import NoSite, Units
from liar_ext.tracing.probe import LayerProbe
from liar_ext.tracing.signature import numbers_a_layer

# of the largest value; norms inside attention compute in float32
EQUAL = 1e-6
# a module keeps its width in that many integers at most
_MOST_ATTRIBUTES = 4
# each costs a few forwards of the layer; families that can be pruned need under 20
_MOST_CHOICES = 128


def with_attributes(probes: Sequence[LayerProbe], found: Units) -> SiteSpec:
    """The spec with the attributes that have to change with the width.

    Args:
        probes: of the layer, under each implementation of attention.
    Raises:
        NoSite: the layer does not run, or not the same, without a unit, whatever is changed.
    """
    candidates = [
        *_candidates(probes[0].layer, found),
        *(entry for probe in probes[:1] for entry in _config_candidates(probe, found)),
    ]
    choices = itertools.chain.from_iterable(
        itertools.combinations(candidates, count) for count in range(_MOST_ATTRIBUTES + 1)
    )
    for chosen in itertools.islice(choices, _MOST_CHOICES):
        spec = replace(found.spec, attributes=chosen)
        if difference(probes, replace(found, spec=spec)) is None:
            return spec
    given_up = ""
    if next(choices, None) is not None:
        given_up = (
            f" ({len(candidates)} integers of its modules are as large as a width; "
            f"{_MOST_CHOICES} choices of them were tried)"
        )
    # what is in the way when every count of heads is right
    counts = tuple(entry for entry in candidates if entry[2] != "columns")
    problem = difference(probes, replace(found, spec=replace(found.spec, attributes=counts)))
    raise NoSite(f"{found.spec.consumer}: units cannot be removed: {problem}{given_up}")


def difference(probes: Sequence[LayerProbe], found: Units) -> str | None:
    """What is not equal when units are removed, or None: the first, the last, some, and all but
    one."""
    for keep in kept_sets(found.columns.shape[0]):
        for probe in probes:
            smaller = LayerProbe(without(probe.layer, found, keep), probe.call)
            problem = same_columns(probe, smaller, found, keep)
            if problem is not None:
                return problem
    return None


def kept_sets(units: int) -> list[Tensor]:
    """Sorted units to keep: sets that a mistake in a row or in a count shows in."""
    every = torch.arange(units)
    sets = [every[1:], every[:-1], every[::2], every[1::2], every[-1:], every[:1]]
    unique = {tuple(keep.tolist()): keep for keep in sets if 0 < keep.numel() < units}
    return list(unique.values())


def without(layer: nn.Module, found: Units, keep: Tensor) -> nn.Module:
    """A copy of a layer (its linears on `meta`) with the units `keep`."""
    configs = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    smaller = copy.deepcopy(layer, dict(configs))
    Site(found.spec, 0, smaller, found.head_dim).shrink(keep)
    return smaller


def same_columns(dense: LayerProbe, smaller: LayerProbe, found: Units, keep: Tensor) -> str | None:
    """Whether a layer with the units `keep` gives its consumer those columns of the dense one."""
    consumer = found.spec.consumer
    said = {}
    for path, rows in found.rows.items():
        kept = rows[keep].flatten().sort().values
        if smaller.widths[path] != kept.numel():
            return f"{path} has {smaller.widths[path]} rows where {kept.numel()} are left"
        said[path] = dense.base(path)[..., kept]
    try:
        with torch.no_grad():
            whole = dense.run(1, {}).inputs[consumer]
            x = smaller.run(1, said).inputs.get(consumer)
    except InputError as error:
        return str(error)
    expected = whole[..., found.columns[keep].flatten()]
    if x is None or x.shape != expected.shape:
        shape = None if x is None else tuple(x.shape)
        return f"{consumer} is then given {shape} where {tuple(expected.shape)} is left"
    apart = float((x - expected).abs().max()) / float(expected.abs().max().clamp_min(1e-30))
    if not apart <= EQUAL:
        return f"what {consumer} is then given differs by {apart:.1e} of its size"
    return None


def _candidates(layer: nn.Module, found: Units) -> Iterator[tuple[str, str, str]]:
    """Integers of modules around the consumer and producers that are as large as a width."""
    sizes = _sizes(found)
    for path in _around(found):
        for name, value in vars(layer.get_submodule(path)).items():
            if type(value) is int and not name.startswith("_") and not numbers_a_layer(name):
                for what, size in sizes.items():
                    if value == size:
                        yield path, name, what


def _config_candidates(probe: LayerProbe, found: Units) -> Iterator[tuple[str, str, str]]:
    """The same of what these modules read of their config in a forward."""
    sizes = _sizes(found)
    for path in _around(found):
        module = probe.layer.get_submodule(path)
        if not isinstance(config := vars(module).get("config"), PretrainedConfig):
            continue
        asked = Asked(config)
        object.__setattr__(module, "config", asked)
        try:
            with torch.no_grad():
                probe.run(1, {})
        finally:
            object.__setattr__(module, "config", config)
        for name in asked.fields():
            value = getattr(config, name)
            if type(value) is int:
                for what, size in sizes.items():
                    if value == size:
                        yield path, f"{PREFIX}{name}", what


def _sizes(found: Units) -> dict[str, int]:
    count, columns = found.columns.shape[0], found.columns.numel()
    heads = columns // found.head_dim
    sizes = {"units": count, "query_heads": heads, "columns": columns}
    if found.spec.kind == "ffn" or heads == count:
        del sizes["query_heads"]
    if found.spec.kind == "ffn":
        del sizes["units"]
    return sizes


def _around(found: Units) -> list[str]:
    """The modules that the consumer or a producer is in, from the inside to the layer."""
    paths = [found.spec.consumer, *found.rows]
    around: dict[str, None] = {}
    for path in paths:
        while "." in path:
            path = path.rpartition(".")[0]
            around[path] = None
    return [*around, ""]

"""`trace`: the Sites of a model by its config alone, each of them proved; see the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import ADAPTERS, known_adapter, layout, linear, refusal, text_config
from liar_ext.models.adapter import Adapter
from liar_ext.models.site import Site, SiteSpec
from liar_ext.models.traced import KEY, NO_LIMIT, TracedFamily
from liar_ext.tracing.attempt import REFUSALS, attempt
from liar_ext.tracing.dependence import NoSite, Units, graph, units
from liar_ext.tracing.passage import (
    check_pruned,
    check_streaming,
    head_is_plain,
    is_causal,
    longest_input,
)
from liar_ext.tracing.probe import LayerProbe
from liar_ext.tracing.removal import with_attributes
from liar_ext.tracing.signature import signature
from liar_ext.tracing.stand_ins import Skeleton, skeleton
from liar_ext.tracing.stated import stated_fields


@dataclass(frozen=True)
class TracedSite:
    """A Site of a layer, with its widths there.

    Attributes:
        adapter_agrees: whether the family's adapter has the same consumer, producers, units and
            columns; None where there is no adapter.
    """

    spec: SiteSpec
    units: int
    columns: int
    adapter_agrees: bool | None


@dataclass(frozen=True)
class Trace:
    """Everything that was found.

    Attributes:
        family: the adapter as data; backbone: class of the headless model; depth: layers.
        layer_class: of a layer. sites: of the first layer.
    """

    family: TracedFamily
    backbone: str
    layer_class: str
    depth: int
    sites: tuple[TracedSite, ...]

    def to_json(self) -> dict[str, Any]:
        family = self.family.to_json()
        widths = {site.spec.consumer: site for site in self.sites}
        for entry in family["sites"]:
            site = widths[entry["consumer"]]
            entry |= {
                "units": site.units,
                "columns": site.columns,
                "adapter_agrees": site.adapter_agrees,
            }
        return {
            "backbone": self.backbone,
            "layer_class": self.layer_class,
            "depth": self.depth,
            **family,
        }


def trace(model: PretrainedConfig | PreTrainedModel) -> Trace:
    """Find the Sites of a text model by running its layers without weights.

    Args:
        model: a config, or a model, of which only the config is read.
    Raises:
        UnsupportedModelError: it cannot be traced, or has no Site; says why.
    """
    config = model if isinstance(model, PretrainedConfig) else model.config
    text = text_config(config)
    reason = refusal(config)
    if reason is not None:
        raise UnsupportedModelError(f"model type {text.model_type!r} cannot be pruned: {reason}")
    try:
        return _trace(text)
    except REFUSALS as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"model type {text.model_type!r} cannot be traced: {reason}"
        ) from error


def traced_data(data: dict[str, Any], targets: tuple[str, ...]) -> dict[str, Any]:
    """A `config.json` with what a trace says of it; as it is where the family has an adapter.

    Args:
        targets: kinds of Site that are to be pruned.
    Raises:
        UnsupportedModelError: it cannot be traced, or has no Site of a targeted kind.
    """
    config = layout.config_object(data)
    if text_config(config).model_type in ADAPTERS:
        return data
    family = trace(config).family
    kinds = [spec.kind for spec in family.sites]
    for kind in targets:
        if kind not in kinds:
            reasons = "; ".join(family.refused.values()) or "no linear of a layer is one's consumer"
            raise UnsupportedModelError(
                f"--target {kind}: the trace of {family.model_type!r} found none ({reasons}); "
                f"it found {', '.join(kinds)}"
            )
    return data | {KEY: family.to_json()}


def _trace(config: PretrainedConfig) -> Trace:
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise InputError(f"its config states no {name}")
    config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != KEY})
    found = skeleton(config)
    with attempt("the model, on a few tokens"):
        causal = is_causal(found)
    if causal and type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise InputError("no token sees what comes after it, but it has no language-model head")
    with attempt("its layers, one after the other"):
        check_streaming(found)
    by_layer, refused, residual = _sites(found, _eager(found, config))
    first = by_layer[0]
    with attempt("the model, without some units of each layer"):
        check_pruned(found, by_layer)
    specs: list[SiteSpec] = []
    explicit: dict[str, Any] = {}
    probe = _probe(found, 0)
    for own in first.values():
        fields, beside = stated_fields(found, own, probe, config)
        explicit |= beside
        specs.append(replace(own.spec, config_fields=fields))
    with attempt("the model, on as many tokens as it takes"):
        longest = longest_input(found)
    with attempt("its language-model head"):
        plain_head = causal and head_is_plain(found)
    family = TracedFamily(
        model_type=config.model_type,
        layers=found.path,
        decoder=causal,
        head_dim=max(own.head_dim for own in first.values()),
        max_positions=longest or NO_LIMIT,
        residual=residual and len(specs) == 2,
        plain_head=plain_head,
        returns=found.returns,
        takes=found.options,
        explicit=explicit,
        sites=tuple(specs),
        refused=refused,
        transformers=transformers.__version__,
    )
    adapter = known_adapter(config)
    return Trace(
        family,
        type(found.model).__name__,
        type(found.layers[0]).__name__,
        len(found.layers),
        tuple(
            TracedSite(
                spec,
                own.columns.shape[0],
                own.columns.numel(),
                None if adapter is None else _agrees(adapter, config, found.layers[0], own),
            )
            for spec, own in zip(specs, first.values(), strict=True)
        ),
    )


def _sites(
    found: Skeleton, eager: Skeleton | None
) -> tuple[list[dict[str, Units]], dict[str, str], bool]:
    """Of every layer the units by consumer; why other consumers have none; whether all layers are
    sums of their input and their Sites' outputs.

    Layers of the same signature are looked at once.

    Raises:
        InputError: no layer has a Site, or layers have others than the first.
    """
    known: dict[str, tuple[dict[str, Units], dict[str, str], bool]] = {}
    by_layer = []
    for index, layer in enumerate(found.layers):
        own = signature(layer, index)
        if own not in known:
            known[own] = _layer_sites(found, eager, index)
        by_layer.append(known[own][0])
    sites, refused, _ = known[signature(found.layers[0], 0)]
    for other, _, _ in known.values():
        if [entry.spec for entry in other.values()] != [entry.spec for entry in sites.values()]:
            raise InputError("its layers differ: not all have the Sites of the first")
    if not sites:
        reasons = "; ".join(refused.values()) or "no linear is given what others of a layer make"
        raise InputError(f"it has no Sites: {reasons}")
    return by_layer, refused, all(residual for _, _, residual in known.values())


def _layer_sites(
    found: Skeleton, eager: Skeleton | None, index: int
) -> tuple[dict[str, Units], dict[str, str], bool]:
    probe = _probe(found, index)
    # what a module keeps of its width may be used by one implementation of attention only
    probes = [probe, *([] if eager is None else [_probe(eager, index)])]
    reach = graph(probe)
    sites: dict[str, Units] = {}
    refused = {path: f"{path}: {how}" for path, how in reach.odd.items()}
    for consumer in reach.inner:
        try:
            own = units(probe, reach, consumer)
            spec = with_attributes(probes, own)
            sites[consumer] = replace(own, spec=spec)
        except NoSite as reason:
            refused[consumer] = str(reason)
    for kind in ("ffn", "heads"):
        same = [consumer for consumer, own in sites.items() if own.spec.kind == kind]
        if len(same) > 1:
            for consumer in same:
                del sites[consumer]
                refused[consumer] = f"{' and '.join(same)}: two Sites of kind {kind} in a layer"
    sums = reach.residual and reach.to_output == frozenset(sites)
    return sites, refused, sums


def _eager(found: Skeleton, config: PretrainedConfig) -> Skeleton | None:
    """The same model with attention written out, where it has that."""
    try:
        eager = skeleton(config, "eager")
        eager.call(1, 0)
    except REFUSALS:
        return None
    return eager


def _probe(found: Skeleton, index: int) -> LayerProbe:
    return LayerProbe(found.layers[index], lambda count: found.call(count, index))


def _agrees(adapter: Adapter, config: PretrainedConfig, layer: nn.Module, own: Units) -> bool:
    """Whether the adapter's Site of this consumer has the same producers, units and columns."""
    spec = next((s for s in adapter.sites if s.consumer == own.spec.consumer), None)
    if spec is None or spec.kind != own.spec.kind or adapter.refuse(config) is not None:
        return False
    site = Site(spec, 0, layer, adapter.head_dim(config))
    return (
        set(spec.producers) == set(own.spec.producers)
        and (site.units, site.columns) == (own.columns.shape[0], own.columns.numel())
        and linear.weight(site.consumer).shape[1] == own.columns.numel()
    )

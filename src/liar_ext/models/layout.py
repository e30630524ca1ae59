"""Layout: the widths of a pruned model, and how a config or this package's own key states them.

Stock transformers can express equal widths in all layers, where the family's config has a field
for them. Everything else is written under the key `liar_ext` of `config.json`, with `model_type`
`liar_ext` so that stock loaders refuse the folder by name instead of loading wrong weights.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import accelerate
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from liar_ext.errors import InputError
from liar_ext.models import ADAPTERS, absent, adapter_for, traced
from liar_ext.models.adapter import Adapter, text_config

KEY = "liar_ext"
VERSION = 1


def config_object(data: dict[str, Any]) -> PretrainedConfig:
    """The config class of `data["model_type"]`, filled from it.

    Raises:
        InputError: the model type is unknown to the installed transformers, or its config class
            rejects the values.
    """
    values = {k: v for k, v in data.items() if k != "model_type"}
    try:
        return AutoConfig.for_model(data["model_type"], **values)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        # an unknown type would list every one that there is
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"config.json (model_type {data.get('model_type')!r}) is not usable: {reason}"
        ) from error


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The stock class the checkpoint was saved from (`architectures`), or the family's default."""
    names = getattr(config, "architectures", None) or []
    for name in names:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and getattr(found, "config_class", None) is type(config):
            return found
    adapter = adapter_for(config)
    auto = transformers.AutoModelForCausalLM if adapter.decoder else transformers.AutoModel
    return cast("type[PreTrainedModel]", auto._model_mapping[type(config)])


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The stock model with parameters on `meta` and real buffers (rotary tables, position ids)."""
    with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
        model = model_class(config)(config)
    return model.eval()


def empty(data: dict[str, Any]) -> PreTrainedModel:
    """The model that a `config.json` describes, dense or with the `liar_ext` key, on `meta`.

    Raises:
        InputError: as `config_object` and `build`.
    """
    return build(data) if KEY in data else empty_model(config_object(data))


def read(model: PreTrainedModel) -> list[dict[str, int]]:
    """Units of every Site, layer by layer: `[{"heads": 4, "ffn": 512}, ...]`; 0 where the layer
    has none of a kind any more."""
    adapter = adapter_for(model.config)
    count = len(adapter.chain(model))
    kinds = tuple(spec.kind for spec in adapter.sites)
    found: list[dict[str, int]] = []
    for index in range(count):
        own = {site.kind: site.units for site in adapter.sites_of(model, index, kinds)}
        found.append({kind: own.get(kind, 0) for kind in kinds})
    return found


def shapes(
    config: PretrainedConfig, widths: list[dict[str, int]], added_biases: list[str]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the pruned model, in the model's order.

    Args:
        config: of the dense model; widths: units of each layer, see `read`.
        added_biases: kinds whose consumers are given a bias.
    Raises:
        InputError: no layer with attention is left that the tokens of a sequence are counted by.
    """
    model = empty_model(config)
    adapter = adapter_for(config)
    for index, units in enumerate(widths):
        for site in adapter.sites_of(model, index, tuple(units)):
            if site.kind in added_biases:
                site.add_biases(filler=site.spec.bias_flag is not None)
            if units[site.kind] < site.units:
                site.shrink(torch.arange(units[site.kind]))
    place_in_cache(model)
    return shapes_of(model)


def place_in_cache(model: PreTrainedModel) -> None:
    """Give the layers of a decoder that have attention their places in the cache.

    Raises:
        InputError: as `absent.renumber`.
    """
    adapter = adapter_for(model.config)
    heads = next((spec for spec in adapter.sites if spec.kind == "heads"), None)
    if adapter.decoder and heads is not None and heads.block is not None:
        types = getattr(text_config(model.config), "layer_types", None)
        absent.renumber(list(adapter.chain(model)), heads.block, types)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, in its order."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def biased_kinds(model: PreTrainedModel) -> list[str]:
    """Kinds whose consumers have a bias now."""
    adapter = adapter_for(model.config)
    kinds = tuple(spec.kind for spec in adapter.sites)
    # a layer may have none of a kind
    count = len(adapter.chain(model))
    sites = [site for index in range(count) for site in adapter.sites_of(model, index, kinds)]
    biased = {site.kind for site in sites if site.bias() is not None}
    return [kind for kind in kinds if kind in biased]


def describe(
    dense: dict[str, Any],
    adapter: Adapter,
    layers: list[dict[str, int]],
    values: dict[str, Any] | None,
    added_biases: list[str],
) -> dict[str, Any]:
    """The `config.json` of a pruned model.

    Args:
        dense: the source's `config.json`.
        layers: units of each layer, see `read`.
        values: config fields for the new widths if they are the same in every layer, else None.
        added_biases: kinds whose consumers were given a bias the source did not have.
    Returns:
        A stock config where stock transformers can express the model (under the family's alias if
        only that accepts the head count), else one with the `liar_ext` key.
    """
    new = copy.deepcopy(dense)
    unflagged = []
    for spec in adapter.sites:
        if spec.kind in added_biases and spec.bias_flag is not None:
            _text(new)[spec.bias_flag] = True
        elif spec.kind in added_biases:
            unflagged.append(spec.kind)
    if values is not None and not unflagged:
        stock = copy.deepcopy(new)
        text = _text(stock)
        text.update(adapter.explicit(text_config(config_object(dense))))
        text.update(values)
        if _accepted(stock) and (not adapter.traced or _builds(stock, dense, layers)):
            return stock
        renamed = _aliased(stock, dense, adapter)
        if renamed is not None and not added_biases and _accepted(renamed):
            return renamed
    new[KEY] = {
        "version": VERSION,
        "base_model_type": new["model_type"],
        "layers": layers,
        "added_biases": unflagged,
    }
    new["model_type"] = KEY
    return new


def equal_values(model: PreTrainedModel, dense: list[dict[str, int]]) -> dict[str, Any] | None:
    """Config fields for the model's widths, or None when the config cannot state them."""
    adapter = adapter_for(model.config)
    layers = read(model)
    values: dict[str, Any] = {}
    for spec in adapter.sites:
        if all(now[spec.kind] == was[spec.kind] for now, was in zip(layers, dense, strict=True)):
            continue
        own = {layer[spec.kind] for layer in layers}
        if spec.config_fields is None or len(own) > 1 or own == {0}:
            return None
        values.update(adapter.sites_of(model, 0, (spec.kind,))[0].config_values())
    return values


def base_data(data: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` as the family knows it: without the `liar_ext` key, if it has one."""
    if KEY not in data:
        return data
    base = {name: value for name, value in data.items() if name != KEY}
    return base | {"model_type": data[KEY]["base_model_type"]}


def loader_of(config: dict[str, Any], dense: dict[str, Any]) -> str:
    """Who loads the result: `stock`, `stock (as mistral)` or `liar_ext`."""
    if KEY in config:
        return KEY
    changed = config["model_type"] != dense["model_type"]
    return f"stock (as {config['model_type']})" if changed else "stock"


def update(config: PretrainedConfig, data: dict[str, Any]) -> None:
    """Make a live config object say what the `config.json` data says.

    A model in memory keeps its class, so an alias family's data is not applied beyond the widths.
    """
    if KEY in data:
        setattr(config, KEY, data[KEY])
    text, values = text_config(config), _text(data)
    adapter = adapter_for(config)
    # what `describe` may change in the config of the layers
    widths = {"head_dim", *adapter.explicit(text)}
    for spec in adapter.sites:
        widths |= {*(spec.config_fields or {}), *([spec.bias_flag] if spec.bias_flag else [])}
    for name, value in values.items():
        if name in widths and getattr(text, name, None) != value:
            setattr(text, name, value)


def build(data: dict[str, Any]) -> PreTrainedModel:
    """An empty model with the shapes that a `config.json` with the `liar_ext` key describes.

    Raises:
        InputError: an unknown version or a malformed key.
    """
    layout = data[KEY]
    if not isinstance(layout, dict) or layout.get("version") != VERSION:
        version = layout.get("version") if isinstance(layout, dict) else layout
        raise InputError(f"config.json: {KEY} version {version!r}; this release reads {VERSION}")
    if "convolutions" in layout:
        from liar_ext.convolution import network

        return network.build(data)
    if not all(isinstance(layout.get(k), list) for k in ("layers", "added_biases")):
        raise InputError(f"config.json: {KEY} has no lists of layers and added_biases")
    config = config_object(base_data(data))
    _renew_trace(config)
    model = empty_model(config)
    adapter = adapter_for(config)
    count = len(adapter.chain(model))
    if len(layout["layers"]) != count:
        raise InputError(
            f"config.json: {KEY} lists {len(layout['layers'])} layers, the model has {count}"
        )
    for index, widths in enumerate(layout["layers"]):
        for site in adapter.sites_of(model, index, tuple(widths)):
            least = 0 if site.spec.block is not None else 1
            if not least <= widths[site.kind] <= site.units:
                raise InputError(
                    f"config.json: {KEY} layer {index} {site.kind} {widths[site.kind]}: "
                    f"must be {least} to {site.units}"
                )
            if site.kind in layout["added_biases"]:
                site.add_biases(filler=False)
            site.shrink(torch.arange(widths[site.kind]))
    place_in_cache(model)
    # save_pretrained of the loaded model keeps the key, and `liar_ext.load` reads it again
    setattr(model.config, KEY, layout)
    return model


def _renew_trace(config: PretrainedConfig) -> None:
    """Trace a model again that was traced under another release: how layers are called is of the
    release that runs them.

    Raises:
        InputError: its Sites differ there.
    """
    family = traced.traced_family(config)
    if family is None or family.transformers == transformers.__version__:
        return
    from liar_ext.tracing import trace

    now = trace(config).family
    if (now.sites, now.head_dim, now.layers) != (family.sites, family.head_dim, family.layers):
        raise InputError(
            f"config.json: {traced.KEY} is of transformers {family.transformers}; in "
            f"{transformers.__version__} the layers of {family.model_type!r} have other Sites. "
            "Install that release"
        )
    setattr(config, traced.KEY, now.to_json())


def _text(data: dict[str, Any]) -> dict[str, Any]:
    nested = data.get("text_config")
    family = data[traced.KEY]["model_type"] if traced.KEY in data else None
    known = (*ADAPTERS, family)
    return nested if isinstance(nested, dict) and nested.get("model_type") in known else data


def _builds(stock: dict[str, Any], dense: dict[str, Any], layers: list[dict[str, int]]) -> bool:
    """Whether stock transformers makes exactly the tensors of the pruned model from a config."""
    found = shapes_of(empty_model(config_object(stock)))
    return found == shapes(config_object(dense), layers, [])


def _accepted(data: dict[str, Any]) -> bool:
    try:
        config_object(data)
    except InputError:
        return False
    return True


def _aliased(
    data: dict[str, Any], dense: dict[str, Any], adapter: Adapter
) -> dict[str, Any] | None:
    """The same model under the alias family, where that is the same function."""
    if adapter.alias is None or _text(data) is not data:
        return None
    if data.get("attention_bias") or data.get("mlp_bias"):
        return None
    # what the source leaves to its family's defaults has other defaults here
    own = config_object(dense).to_dict()
    theirs = config_object({"model_type": adapter.alias}).to_dict()
    other = {n: own[n] for n, value in theirs.items() if n in own and own[n] != value}
    other |= copy.deepcopy(data)
    old = type(config_object({"model_type": adapter.model_type})).__name__.removesuffix("Config")
    new = type(config_object({"model_type": adapter.alias})).__name__.removesuffix("Config")
    other["model_type"] = adapter.alias
    other["architectures"] = [n.replace(old, new) for n in data.get("architectures") or []]
    other["sliding_window"] = None
    # without a release of 5 or later, tokenizers take a mistral folder for one with an old mistake
    other["transformers_version"] = transformers.__version__
    if any(not hasattr(transformers, name) for name in other["architectures"]):
        return None
    return other

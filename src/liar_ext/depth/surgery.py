"""A model of some layers of another, in memory: left out, moved, repeated, or replaced.

The model is built again from its new config, so that everything that transformers derives from a
layer's place is made for the new one: cache indices, attention types, masks. The tensors are those
of the source. That no layer became another by its move is checked layer by layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import accelerate
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from liar_ext.checkpoint.reader import tied_names
from liar_ext.depth.config import COUNT, check_kept, remapped
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.models import adapter_for, known_adapter, layout, text_config
from liar_ext.models.absent import INDEX

Model = TypeVar("Model", bound=PreTrainedModel)


@torch.no_grad()
def surgery(
    model: Model, kept: Sequence[int], inserted: Mapping[int, nn.Module] | None = None
) -> Model:
    """A model with these layers; the source stays as it is.

    Args:
        model: with one list of layers, dense or pruned, on any device.
        kept: for each layer of the result, the layer of the source that it is made of, in any
            order; one that is named again is a copy.
        inserted: modules by the position in the result at which they stand in for the layer that
            `kept` names there: of the same class, with tensors of the same names and shapes. The
            attention type of the place is that of the layer.
    Returns:
        a model of the same class, dtype, device and mode, which shares the source's tensors but
        for repeated and inserted layers, and can be saved with `save_pretrained`.
    Raises:
        InputError: the model has no list of layers, no layer is kept or one is not there, an
            inserted module does not fit, or a layer's function depends on its place.
    """
    path, layers = layer_list(model)
    check_kept(kept, len(layers))
    inserted = dict(inserted or {})
    for at in inserted:
        if not 0 <= at < len(kept):
            raise InputError(f"inserted layer {at}: the result has {len(kept)} layers")
    new = _empty(model, remapped(_data(model), kept))
    found = tensors_of(model, path, kept)
    for at, module in inserted.items():
        found |= {f"{path}.{at}.{name}": value for name, value in _tensors(module)}
    _fill(new, found)
    check_places(path, layers, kept, new, inserted)
    if tied_names(new):
        new.tie_weights(recompute_mapping=False)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    new.name_or_path = model.name_or_path
    return new.train(model.training)


def adopt(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Make a model in place what `surgery` has made of it."""
    model.config = new.config
    for name, module in new.named_children():
        setattr(model, name, module)
    if model.can_generate():
        model.generation_config = new.generation_config


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The layers of a model and their path: its adapter's, or the one list of their number.

    Raises:
        InputError: there is none, or more than one.
    """
    config = text_config(model.config)
    known = known_adapter(config)
    if known is not None:
        known.check_one_stack()
    try:
        return adapter_for(model.config).layer_list(model)
    except UnsupportedModelError:
        pass
    if not isinstance(count := getattr(config, COUNT, None), int):
        raise InputError(f"{type(model).__name__} has no {COUNT}: it is no list of layers")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers; one is needed to "
            "leave layers out"
        )
    return lists[0]


def tensors_of(model: nn.Module, path: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Parameters and buffers of `model` under the names that they have with these layers.

    A layer that is named again is copied: two places of a model must not share one.
    """
    inside = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")
    places: dict[int, list[int]] = {}
    for at, layer in enumerate(kept):
        places.setdefault(layer, []).append(at)
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(model):
        match = inside.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        for count, at in enumerate(places.get(int(match[1]), [])):
            found[f"{path}.{at}.{match[2]}"] = tensor if count == 0 else _copied(tensor)
    return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = list(module.named_parameters(remove_duplicate=False))
    return [*own, *module.named_buffers(remove_duplicate=False)]


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def _data(model: PreTrainedModel) -> dict[str, Any]:
    data = model.config.to_dict()
    data.setdefault("architectures", [type(model).__name__])
    return data


def _empty(model: Model, data: dict[str, Any]) -> Model:
    """The class of `model`, with parameters on `meta`, as the new config has it."""
    if layout.KEY in data:
        new: Any = layout.build(data)
    else:
        config = layout.config_object(data)
        with no_init_weights(), accelerate.init_empty_weights(include_buffers=False):
            new = type(model)(config)
    if type(new) is not type(model):
        raise InputError(
            f"the config describes a {type(new).__name__}, the model is a {type(model).__name__}"
        )
    kind = getattr(model.config, "_attn_implementation", None)
    if kind is not None and getattr(new.config, "_attn_implementation", None) != kind:
        new.set_attn_implementation(kind)
    return new


def _fill(new: nn.Module, found: Mapping[str, Tensor]) -> None:
    for name, empty in _tensors(new):
        owner, _, leaf = name.rpartition(".")
        module = new.get_submodule(owner)
        value = found.get(name)
        if value is None:
            # a buffer that the new config has and the old one had not
            if empty.is_meta:
                raise InputError(f"{name} is not in the model that the layers are of")
            continue
        if value.shape != empty.shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, its place takes {tuple(empty.shape)}"
            )
        if isinstance(empty, nn.Parameter):
            same = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            setattr(module, leaf, same)
        else:
            module._buffers[leaf] = value


def check_places(
    path: str,
    layers: nn.ModuleList,
    kept: Sequence[int],
    new: PreTrainedModel,
    inserted: Mapping[int, nn.Module],
) -> None:
    """Whether each layer is what it was, but for its index; works on `meta`.

    Args:
        path: of the list of layers; layers: of the source; kept: for each layer of the result, its
            index there; new: the result; inserted: what stands in for them, by place.
    Raises:
        InputError: it says which setting of which layer its new place changes.
    """
    rebuilt = new.get_submodule(path)
    assert isinstance(rebuilt, nn.ModuleList)
    if len(rebuilt) != len(kept):
        raise InputError(
            f"a {type(new).__name__} of {len(kept)} layers has {len(rebuilt)} at {path}"
        )
    for at, (layer, made) in enumerate(zip(kept, rebuilt, strict=True)):
        source = inserted.get(at, layers[layer])
        if type(source) is not type(made):
            raise InputError(
                f"layer {layer} is a {type(source).__name__}, in place {at} of "
                f"{type(new).__name__} stands a {type(made).__name__}"
            )
        parts = dict(made.named_modules())
        for name, module in layers[layer].named_modules():
            mine, theirs = settings(module), settings(parts[name]) if name in parts else None
            if theirs is None or mine != theirs:
                changed = sorted(k for k in mine if theirs is None or theirs.get(k) != mine[k])
                where = f"{path}.{layer}.{name}".rstrip(".")
                raise InputError(
                    f"{where}: {', '.join(changed) or 'the module'} would be another in place "
                    f"{at}, so that the layer would be another; keep layers of its kind in step"
                )


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module was told when it was made: plain values, but for its place."""
    plain = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in (INDEX, "training") and name[0] != "_"
    }

"""The `config.json` of a model whose layers are others: all that is keyed by a layer's index.

`kept` says of each layer of the result which layer of the source it is: `[0, 1, 3]` leaves out
layer 2, `[0, 1, 1, 2]` has layer 1 twice.

A config that is left stale is not an error when it is read: transformers makes layers that are
missing from the checkpoint up, ignores those beyond the count, and derives the attention type of a
layer again from its new place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from liar_ext.errors import InputError
from liar_ext.models import layout, text_config

COUNT = "num_hidden_layers"
# a value for each layer
PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers"),
    *("attention_layers", "activation_sparsity_pattern", "num_attention_heads_per_layer"),
    *("num_key_value_heads", "num_attention_heads", "num_query_heads", "intermediate_size"),
    *("ffn_multipliers", "sliding_windows", "window_sizes"),
)
# the indices of some layers
INDICES = ("mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs")
# layers below this are of another kind
BELOW = ("max_window_layers", "first_k_dense_replace")
# the function of these is of the index itself, or another layer's, so that no remapping keeps it
INDEXED = {
    "scale_attn_by_inverse_layer_idx": "divides the scores of attention by a layer's index",
    "num_kv_shared_layers": "lets layers read keys and values of others",
    "decoder_sparse_step": "chooses layers by multiples of their index",
}
HARMLESS = {"decoder_sparse_step": (1,)}
# lists that are as long as a model has layers by chance only
OTHER_LISTS = (
    *("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "bad_words_ids", "forced_eos_token_id", "partial_rotary_factor"),
    *("keys_to_ignore_at_inference", "sub_configs", "pruned_heads", "mrope_section"),
)


def count_of(data: dict[str, Any]) -> int:
    """Layers of the model that a `config.json` describes.

    Raises:
        InputError: it has no number of layers.
    """
    return _count(_described(data, data)[0])


def _count(config: PretrainedConfig) -> int:
    count = getattr(config, COUNT, None)
    if not isinstance(count, int):
        raise InputError(
            f"config.json: a {config.model_type} model has no {COUNT}: it is no list of layers "
            "of one kind, of which some could be left out, merged or inserted"
        )
    return count


def check_kept(kept: Sequence[int], count: int) -> None:
    """Raises InputError unless `kept` are some of `count` layers."""
    if not kept:
        raise InputError(f"no layer of {count} would be left; keep at least one")
    for layer in kept:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer}: the model has {count} layers, 0 to {count - 1}")


def remapped(data: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The `config.json` of the model with these layers.

    Args:
        data: the source's `config.json`, also one with the `liar_ext` key; kept: for each layer of
            the result, its index in the source.
    Returns:
        new data. What the source leaves to its family to derive from a layer's place, as
        `layer_types`, is stated.
    Raises:
        InputError: no layer, one that is not there, a model whose layers depend on their index, or
            a list that is as long as the model has layers and is not known.
    """
    new = copy.deepcopy(data)
    obj, text = _described(data, new)
    count = _count(obj)
    check_kept(kept, count)
    stated = obj.to_dict()
    for name, what in INDEXED.items():
        if stated.get(name) and stated[name] not in HARMLESS.get(name, ()):
            raise InputError(f"config.json: {name} {what}; its layers cannot be left out or moved")
    own = obj.attribute_map.get(COUNT, COUNT)
    # older releases wrote the count under every name that it has, and the last one read wins
    for name in {own, *(alias for alias, name in obj.attribute_map.items() if name == own)}:
        if name == own or name in text:
            text[name] = len(kept)
    for name, value in stated.items():
        if name in INDICES and value:
            text[name] = [at for at, layer in enumerate(kept) if layer in value]
        elif name in BELOW and isinstance(value, int):
            text[name] = sum(layer < value for layer in kept)
        elif isinstance(value, list | tuple) and len(value) == count:
            if name in PER_LAYER:
                text[name] = [value[layer] for layer in kept]
            elif name in text and name not in (*OTHER_LISTS, *INDICES):
                raise InputError(
                    f"config.json: {name} has {count} entries, as many as there are layers, and "
                    "it is not known whether they are the layers'; "
                    "report the model type, or remove the field if it means nothing"
                )
    if layout.KEY in new:
        own = new[layout.KEY]
        new[layout.KEY] = own | {"layers": [own["layers"][layer] for layer in kept]}
    return new


def _described(
    data: dict[str, Any], new: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config object of the layers in `data`, and the part of `new` that it is made from."""
    config = layout.config_object(layout.base_data(data))
    layers = text_config(config)
    return layers, new if layers is config else new["text_config"]

"""Recipes that aim at the dense model, and what its and a pruned copy's linears get, by hooks."""

from __future__ import annotations

import copy

import torch
from liar_families import batches_of, outputs, write_tokens

from liar_ext import Recipe
from liar_ext.models import adapter_for, linear

KINDS = ("heads", "ffn")
# the norm between the two additions of a layer; families without one add both at its end
BETWEEN = {
    **dict.fromkeys(("llama", "granite", "phi3"), "post_attention_layernorm"),
    "gpt2": "ln_2",
    "opt": "final_layer_norm",
}


def setting(tmp_path, *, decoder: bool = True, **changes):
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": 24,
        "batch_size": 5,
        "sparsity": 0.5,
        "target": KINDS,
        "target_signal": "dense",
        "ridge": 1e-3,
    }
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=decoder)


def inputs_of(model, path: str, batches) -> torch.Tensor:
    """What a linear gets on the calibration tokens, (T, n)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for batch in batches:
        outputs(model, batch.input_ids, attention_mask=batch.attention_mask.long())
    handle.remove()
    masks = [batch.attention_mask.flatten() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)])


def standing(dense, small, index: int, kind: str):
    """`small` before the Site (index, kind) was pruned: what comes from there on is dense."""
    model, adapter = copy.deepcopy(small), adapter_for(dense.config)
    layers, whole = (adapter.layer_list(m)[1] for m in (model, dense))
    for later in range(index, len(layers)):
        layers[later] = copy.deepcopy(whole[later])
    if kind == "ffn":
        name = adapter.sites_of(dense, index, ("heads",))[0].spec.consumer.partition(".")[0]
        setattr(
            layers[index], name, copy.deepcopy(getattr(adapter.layer_list(small)[1][index], name))
        )
    return model


def kept_columns(before, after) -> torch.Tensor:
    """Columns that a Site kept, found again by its last producer's rows."""
    producer = before.spec.producers[-1]
    wide, narrow = (
        linear.weight(s.module.get_submodule(producer.path)).unflatten(0, (producer.segments, -1))[
            producer.segment
        ]
        for s in (before, after)
    )
    rows = torch.tensor(
        [int((wide == row).all(1).nonzero()[0]) for row in narrow], dtype=torch.int64
    )
    width = len(wide) // before.units
    return before.unit_columns(rows[::width] // width)


def states_at(model, index: int, place: str, batches) -> torch.Tensor:
    """The residual stream in front of a layer, between its additions or behind it, (T, d)."""
    adapter = adapter_for(model.config)
    layer = adapter.layer_list(model)[1][index]
    if place == "between" and model.config.model_type not in BETWEEN:
        (attention,) = adapter.sites_of(model, index, ("heads",))
        front = states_at(model, index, "front", batches)
        said = inputs_of(model, attention.name, batches).double() @ attention.weight().double().T
        bias = attention.bias()
        return front + said + (0 if bias is None else bias.double())
    seen: list[torch.Tensor] = []

    def before(_, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone())

    def behind(_, args, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append(output.flatten(0, -2).clone())

    if place == "behind":
        handle = layer.register_forward_hook(behind)
    else:
        path = "" if place == "front" else BETWEEN[model.config.model_type]
        module = layer.get_submodule(path)
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    for batch in batches:
        outputs(model, batch.input_ids, attention_mask=batch.attention_mask.long())
    handle.remove()
    masks = [batch.attention_mask.flatten() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]).double()


def fit(x, target, weight, keep, ridge: float, center: bool):
    """W' and b' by lstsq on raw activations; the ridge pulls to W_S."""
    kept, own = x[:, keep].double(), weight[:, keep].double()
    x, missing = x.double(), target - kept @ own.T
    square = (x - x.mean(0)).square() if center else x.square()
    strength = (ridge * square.mean() * len(x)).sqrt()
    means = (kept.mean(0), missing.mean(0)) if center else (0.0, 0.0)
    rows = torch.cat([kept - means[0], strength * torch.eye(len(keep), dtype=torch.float64)])
    right = torch.cat([missing - means[1], missing.new_zeros(len(keep), len(weight))])
    change = torch.linalg.lstsq(rows, right, driver="gelsd").solution.T
    return own + change, (means[1] - change @ means[0]) if center else None

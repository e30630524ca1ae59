"""Which tensor of the files is which of a model: by their names alone, before any is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES

from liar_ext import InputError
from liar_ext.checkpoint.matching import KeptLayers, left_over, matched
from liar_ext.models import layout


@pytest.fixture
def model():
    return layout.empty_model(FAMILIES["llama-mha"].build().config)


def _stored(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.input_layernorm.weight", "model.layers.12.input_layernorm.weight"),
        ("model.layers_norm.0.weight", "model.layers_norm.0.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_kept_layer_has_the_name_of_its_own_in_the_files(name, stored):
    assert KeptLayers("model.layers", (1, 12)).stored_name(name) == stored


def test_of_two_layers_of_three_the_third_is_not_left_over(model):
    """The files have one layer in front of the model's, and a tensor of nobody's."""
    kept = KeptLayers("model.layers", tuple(range(1, model.config.num_hidden_layers + 1)))
    stored = {kept.stored_name(name): shape for name, shape in _stored(model).items()}
    gone = {
        name.replace("layers.1.", "layers.0."): shape
        for name, shape in stored.items()
        if ".layers.1." in name
    }
    files = {**stored, **gone, "adapter.weight": (1,)}
    found = matched(model, files, Path("x"), kept=kept, whole={})
    assert found == {name: kept.stored_name(name) for name in _stored(model)}
    assert left_over(model, files, found.values(), kept) == ["adapter.weight"]
    assert left_over(model, files, found.values(), None) == sorted(["adapter.weight", *gone])


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_base_model_may_be_stored_without_its_prefix(model, prefixed):
    stored = {
        name if prefixed else name.removeprefix("model."): shape
        for name, shape in _stored(model).items()
    }
    found = matched(model, stored, Path("x"), kept=None, whole={})
    assert set(found.values()) == set(stored)


def test_other_shapes_and_missing_tensors_are_named(model):
    stored = _stored(model)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=rf"x: {name} has shape \(1, 2\), config.json implies"):
        matched(model, {**stored, name: (1, 2)}, Path("x"), kept=None, whole={})
    del stored[name]
    with pytest.raises(InputError, match=f"1 tensors of LlamaForCausalLM .* first {name}"):
        matched(model, stored, Path("x"), kept=None, whole={})


def test_a_tied_head_needs_no_tensor(model):
    model.config.tie_word_embeddings = True
    model = type(model)(model.config)
    stored = _stored(model)
    del stored["lm_head.weight"]
    found = matched(model, stored, Path("x"), kept=None, whole={})
    assert "lm_head.weight" not in found
    assert set(found) == set(stored)
    assert all(torch.Size(stored[name]) == model.state_dict()[name].shape for name in found)

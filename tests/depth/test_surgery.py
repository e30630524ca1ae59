"""A model of other layers: the same function, cache and files as one that was made so."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import FAMILIES, outputs, probe_tokens, randomise

import liar_ext
from liar_ext import InputError
from liar_ext.depth import remapped, surgery
from liar_ext.depth.surgery import layer_list

KEPT = {
    "the same": [0, 1, 2, 3, 4, 5],
    "the first": [0, 1, 2],
    "without the first": [1, 2, 3, 4, 5],
    "without the middle": [0, 1, 4, 5],
    "turned around": [5, 4, 3, 2, 1, 0],
    "grown": [0, 1, 1, 2, 3, 3, 3, 4, 5],
    "one": [3],
}


def by_hand(model, kept):
    """The definition, without a cache: the list of layers itself, with copies of what is repeated.

    Masks of a place are chosen by the config, so that is edited too.
    """
    model = copy.deepcopy(model)
    _, layers = layer_list(model)
    chosen = [copy.deepcopy(layers[i]) for i in kept]
    del layers[:]
    layers.extend(chosen)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_the_layers_are_those_that_were_asked_for(tmp_path, name, kept):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = surgery(model, kept)
    expected = (
        outputs(by_hand(model, kept), use_cache=False)
        if name != "bert"
        else outputs(by_hand(model, kept))
    )
    assert torch.equal(outputs(made), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the source stays as it is"
    # every place has its own index, in order: the cache of keys and values is kept by it
    _, layers = layer_list(made)
    for at, layer in enumerate(layers):
        found = {
            m.layer_idx for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)
        }
        assert found <= {at}
    types = getattr(made.config, "layer_types", None)
    assert types is None or len(types) == len(kept)
    made.save_pretrained(tmp_path / "saved")
    loaders = [getattr(transformers, MODELS[name][0]).from_pretrained, liar_ext.load]
    for load in loaders[: 1 if name == "gptj" else 2]:
        loaded = load(tmp_path / "saved")
        assert torch.equal(outputs(loaded.eval()), outputs(made))


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_generation_is_the_same_with_a_cache(name, kept):
    """Beyond the sliding window, so that a wrong mask or index shows."""
    made = surgery(build(name), kept)
    ids = probe_tokens(batch=2, length=12)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        fast = made.generate(ids, use_cache=True, **options)
        slow = made.generate(ids, use_cache=False, **options)
    assert torch.equal(fast, slow)


def test_repeated_layers_are_copies_and_the_others_are_shared():
    model = build("llama")
    made = surgery(model, [0, 1, 1, 2])
    places = [layer.mlp.down_proj.weight.data_ptr() for layer in made.model.layers]
    assert len(set(places)) == 4
    assert places[0] == model.model.layers[0].mlp.down_proj.weight.data_ptr()
    tied = surgery(build("llama-tied"), [0, 1])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_inserted_layers_stand_in_for_those_of_their_place():
    model = build("qwen3-windows")
    other = copy.deepcopy(model.model.layers[5])
    randomise(other, seed=7)
    made = surgery(model, [0, 1, 5, 2], {2: other})
    found = made.model.layers[2].state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    assert made.config.layer_types[2] == model.config.layer_types[5]
    assert made.model.layers[2].self_attn.layer_idx == 2
    assert torch.isfinite(outputs(made)).all()


def test_a_pruned_model_keeps_the_widths_of_its_layers(tmp_path):
    model = FAMILIES["llama-gqa-biases"].build()
    from liar_families import write_tokens

    write_tokens(tmp_path / "tokens.npy")
    model.save_pretrained(tmp_path / "dense")
    recipe = liar_ext.Recipe(
        calibration=str(tmp_path / "tokens.npy"),
        seq_len=24,
        samples=24,
        allocation="influence",
        sparsity=0.5,
    )
    liar_ext.compress(tmp_path / "dense", tmp_path / "pruned", recipe)
    pruned = liar_ext.load(tmp_path / "pruned")
    widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
    made = surgery(pruned, [1, 0, 1])
    assert [layer.mlp.down_proj.in_features for layer in made.model.layers] == [
        widths[i] for i in (1, 0, 1)
    ]
    made.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(liar_ext.load(tmp_path / "again")), outputs(made))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "no layer of 6 would be left"),
        ([0, 6], "layer 6: the model has 6 layers, 0 to 5"),
        ([-1], "layer -1: the model has 6 layers"),
    ],
)
def test_layers_that_are_not_there_are_refused(kept, message):
    with pytest.raises(InputError, match=message):
        surgery(build("llama"), kept)


def test_what_depends_on_its_place_is_refused():
    model = build("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx divides the scores"):
        surgery(model, [0, 1])


def test_inserted_layers_that_do_not_fit_are_refused():
    model = build("llama")
    wide = build("llama")
    wide.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 50, bias=False)
    with pytest.raises(InputError, match=r"mlp\.gate_proj\.weight has shape"):
        surgery(model, [0, 1], {0: wide.model.layers[0]})
    with pytest.raises(InputError, match="layer 0 is a Linear, in place 0"):
        surgery(model, [0, 1], {0: torch.nn.Linear(3, 3)})
    with pytest.raises(InputError, match="inserted layer 2: the result has 2 layers"):
        surgery(model, [0, 1], {2: model.model.layers[0]})


def test_lists_of_unknown_meaning_are_refused():
    data = build("llama").config.to_dict() | {"mysterious": [1, 2, 3, 4, 5, 6]}
    with pytest.raises(InputError, match="mysterious has 6 entries"):
        remapped(data, [0, 1])
    data = build("llama").config.to_dict() | {"eos_token_id": [1, 2, 3, 4, 5, 6]}
    assert remapped(data, [0, 1])["eos_token_id"] == [1, 2, 3, 4, 5, 6]


def test_a_config_states_what_was_derived_from_places():
    """Qwen3 has windows from layer 3 on: of layers 1, 3 and 5, from the second on."""
    data = build("qwen3-windows").config.to_dict()
    del data["layer_types"]
    new = remapped(data, [1, 3, 5])
    assert new["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert new["max_window_layers"] == 1
    assert new["num_hidden_layers"] == 3
    assert data["num_hidden_layers"] == 6

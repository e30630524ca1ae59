"""Merging in memory, against whole copies of the model that run text by text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from liar_depth import build
from liar_families import outputs
from liar_merge import brute_force, last_states, padded, similarity, texts

import liar_ext
from liar_ext import InputError
from liar_ext.calibration import Batch
from liar_ext.depth import MergeSettings, merge
from liar_ext.depth.surgery import layer_list

NAMES = ("llama", "qwen3-windows", "gpt2", "opt", "bert")
SETTINGS = {
    "telescope": MergeSettings(rule="telescope", combine=3, interval=1),
    "telescope-token": MergeSettings(rule="telescope", combine=2, similarity="token"),
    "rdsc": MergeSettings(rule="rdsc", combine=3, interval=1, highest=6),
    "rdsc-norms": MergeSettings(rule="rdsc", combine=4, interval=2, norms="rule"),
    "mean-token": MergeSettings(rule="mean", combine=3, interval=1, similarity="token"),
}


def chosen(model, ids, settings):
    """The settings with a threshold that some merges of the original pass and others do not."""
    _, _, refused = brute_force(model, ids, replace(settings, threshold=1.0))
    ranked = sorted(found for _, _, found in refused)
    return replace(settings, threshold=(ranked[-1] + ranked[-2]) / 2)


def steps_of(trials):
    return [(trial["layer"], len(trial["with"])) for trial in trials]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_it_decides_as_brute_force_does(name, settings):
    model, ids = build(name), texts()
    settings = chosen(model, ids, settings)
    expected, accepted, refused = brute_force(model, ids, settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    new, facts = merge(model, padded(ids), settings)
    assert accepted
    for found, wanted in (("accepted", accepted), ("refused", refused)):
        trials = facts["merge"][found]
        assert steps_of(trials) == [(base, count) for base, count, _ in wanted]
        for trial, (_, _, value) in zip(trials, wanted, strict=True):
            # float32 forwards of padded batches, and of each text alone
            assert trial["similarity"] == pytest.approx(value, abs=2e-6)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the source stays as it is"
    options = {} if name == "bert" else {"use_cache": False}
    wanted, found = outputs(expected, **options), outputs(new)
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    types = getattr(new.config, "layer_types", None)
    assert types == getattr(expected.config, "layer_types", None)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_similarity(name):
    """Whatever it is made of, and however much of it there is."""
    model, ids = build(name), texts()
    settings = MergeSettings(drop=2, combine=3)
    found = []
    for batches in (
        padded(ids, pad=7),
        padded(ids, pad=90),
        [Batch(row.unsqueeze(0), torch.ones(1, len(row), dtype=torch.bool)) for row in ids],
    ):
        _, facts = merge(model, batches, settings)
        trials = [*facts["merge"]["accepted"], *facts["merge"]["refused"]]
        found.append([trial["similarity"] for trial in trials])
    assert found[0] == pytest.approx(found[1], abs=2e-6)
    assert found[0] == pytest.approx(found[2], abs=2e-6)


def test_similarity_is_that_to_the_original_and_not_to_the_last_model():
    model, ids = build("llama"), texts()
    settings = MergeSettings(drop=3, combine=2, interval=1)
    new, facts = merge(model, padded(ids), settings)
    assert len(facts["merge"]["accepted"]) == 3
    direct = similarity("flat", last_states(model, ids), last_states(new, ids))
    assert facts["merge"]["accepted"][-1]["similarity"] == pytest.approx(direct, abs=2e-6)


def test_layers_below_a_base_and_the_original_run_once():
    """6 layers; bases 3, 2, 1, 0 of pairs, none accepted: 5 layers each, from the base on."""
    model, ids = build("llama"), texts()
    settings = MergeSettings(combine=2, drop=1)
    _, facts = merge(model, padded(ids), settings)
    runs = facts["merge"]["layer_evaluations"]
    # the first walk accepts nothing; the second one knows all models that it needs
    assert runs == {"done": 6 + 2 + 3 + 4 + 5, "whole": 6 + 4 * 5, "published": 4 * (6 + 5)}


def test_no_layer_is_run_but_those_that_are_counted():
    model, ids = build("llama"), texts()
    _, layers = layer_list(model)
    calls = []
    # of a part of it: when calls are recorded, layers are called and do nothing
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
        for layer in layers
    ]
    _, facts = merge(model, padded(ids)[:1], MergeSettings(combine=3, drop=2, rule="rdsc"))
    for handle in handles:
        handle.remove()
    runs = facts["merge"]["layer_evaluations"]["done"]
    assert len(calls) == runs


def test_what_is_reported_is_where_layers_went():
    model, ids = build("llama"), texts()
    # from the top: 2 takes in 3 and 4; then 1 takes in that and 5
    settings = MergeSettings(combine=3, interval=1, threshold=-0.999, lowest=1)
    new, facts = merge(model, padded(ids), replace(settings, rule="rdsc"))
    assert facts["layers"] == {
        "before": 6,
        "after": 2,
        "dropped": [2, 3, 4, 5],
        "merged": [
            {
                "layer": 1,
                "place": 1,
                "with": [2, 3, 4, 5],
                "weights": {"1": "-1", "2": "-1", "3": "1", "4": "1", "5": "1"},
                "norms": {"1": "1"},
            }
        ],
    }
    assert new.config.num_hidden_layers == 2


def test_a_merge_of_attention_types_is_said():
    model, ids = build("qwen3-windows"), texts()
    # layers 0 to 2 attend to all, 3 to 5 to a window
    _, facts = merge(model, padded(ids), MergeSettings(drop=1, combine=2, lowest=2, highest=4))
    assert facts["warnings"] == [
        "layer 2 attends by full_attention with weights of layers of sliding_attention"
    ]
    _, facts = merge(model, padded(ids), MergeSettings(drop=1, combine=2, lowest=3, highest=5))
    assert facts["warnings"] == []


def test_merged_layers_are_the_only_new_tensors_and_can_be_trained():
    model, ids = build("llama"), texts()
    model.train()
    new, facts = merge(model, padded(ids), MergeSettings(drop=1, combine=2))
    assert new.training
    assert model.training
    (entry,) = facts["layers"]["merged"]
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for name, parameter in new.named_parameters():
        merged = f"layers.{entry['place']}." in name and "norm" not in name
        assert (parameter.data_ptr() not in own) == merged, name
        assert parameter.requires_grad


def test_layers_of_different_shapes_are_refused_by_name():
    model = build("llama")
    batches = [torch.randint(3, 96, (8, 64))]
    liar_ext.prune(model, batches, liar_ext.Recipe(sparsity=0.5, allocation="influence"))
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj.weight has shape .*in l"):
        merge(model, padded(texts()), MergeSettings(drop=1))


def test_models_and_texts_that_cannot_be_used():
    model = build("llama")
    with pytest.raises(InputError, match="no texts to compare models on"):
        merge(model, [], MergeSettings(drop=1))
    with pytest.raises(InputError, match="'gptj' cannot be pruned: .*--trace"):
        merge(build("gptj"), padded(texts()), MergeSettings(drop=1))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)  # no part of the hidden states
        merge(model, padded(texts()), MergeSettings(drop=1))
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="the model's own last hidden states are not finite"):
        merge(model, padded(texts()), MergeSettings(drop=1))
    model = build("llama")
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"layers.4.mlp.up_proj.weight: has NaN or infinite"):
        merge(model, padded(texts()), MergeSettings(drop=1))

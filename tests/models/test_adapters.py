"""What is refused, by name, and what a Site is."""

from __future__ import annotations

import pytest
import torch
import transformers
from liar_families import FAMILIES

from liar_ext.errors import UnsupportedModelError
from liar_ext.models import ADAPTERS, adapter_for, layout

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.MixtralConfig(**SMALL), "mixture of experts"),
        (transformers.Qwen2MoeConfig(**SMALL), "mixture of experts"),
        (transformers.BartConfig(vocab_size=97, d_model=32), "encoder-decoder"),
        (transformers.BertConfig(**SMALL, is_decoder=True), "only encoders"),
        (transformers.BertConfig(**SMALL, add_cross_attention=True), "cross-attention"),
        (transformers.RobertaConfig(**SMALL, chunk_size_feed_forward=2), "set it to 0"),
        (transformers.GPT2Config(vocab_size=97, add_cross_attention=True), "cross-attention"),
        (transformers.LlamaConfig(**SMALL, quantization_config={"bits": 4}), "quantised"),
        (transformers.PhiConfig(**SMALL), "not a family"),
        (
            transformers.BloomConfig(vocab_size=97, pretraining_tp=2, slow_but_exact=True),
            "slow_but_exact",
        ),
        (
            transformers.Gemma2Config(
                **SMALL, num_key_value_heads=2, use_bidirectional_attention=True
            ),
            "use_bidirectional_attention",
        ),
        (transformers.ElectraConfig(**SMALL, is_decoder=True), "only encoders"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_model_that_cannot_be_pruned_safely_is_refused_by_name(config, says):
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        adapter_for(config)
    assert repr(config.model_type) in str(caught.value)
    assert all(name in str(caught.value) for name in ADAPTERS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_has_its_units_in_forward_order(name):
    model = FAMILIES[name].build()
    adapter = adapter_for(model.config)
    sites = adapter.sites_of(model, 1, ("ffn", "heads"))
    assert tuple(site.kind for site in sites) == FAMILIES[name].kinds
    assert sites[-1].columns_per_unit == 1
    for site in sites:
        assert model.get_submodule(site.name) is site.consumer
        assert site.units == (4 if site.kind == "heads" else site.columns)
        assert site.units * site.columns_per_unit == site.columns == site.weight().shape[1]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds]
)
def test_shrinking_keeps_the_rows_and_columns_of_the_kept_units(name, kind):
    """Against indexing the dense tensors, written out for every layout of weights."""
    dense, model = FAMILIES[name].build(), FAMILIES[name].build()
    adapter = adapter_for(model.config)
    before = adapter.sites_of(dense, 1, (kind,))[0]
    site = adapter.sites_of(model, 1, (kind,))[0]
    keep = torch.tensor([0, 2, 3]) if kind == "heads" else torch.arange(1, site.units, 3)
    parameters = sum(p.numel() for p in model.parameters())
    cost, units = site.unit_parameters, site.units
    site.shrink(keep)
    assert site.units == keep.numel()
    assert sum(p.numel() for p in model.parameters()) == parameters - cost * (units - keep.numel())
    wide = before.weight().unflatten(1, (units, -1))
    assert torch.equal(site.weight(), wide[:, keep].flatten(1))
    for producer in site.spec.producers:
        old = dense.get_submodule(adapter.layer_list(dense)[0] + ".1." + producer.path)
        new = model.get_submodule(adapter.layer_list(model)[0] + ".1." + producer.path)
        transposed = type(old).__name__ == "Conv1D"
        for name_, parameter in old.named_parameters():
            rows = parameter.T if transposed and name_ == "weight" else parameter
            got = getattr(new, name_)
            got = got.T if transposed and name_ == "weight" else got
            runs = rows.chunk(producer.segments)
            # what each producer of this linear has of its rows, in their order
            shared = [p for p in site.spec.producers if p.path == producer.path]
            each = [
                torch.cat(runs[p.segment : p.segment + p.length])
                .unflatten(0, (units, -1))[keep]
                .flatten(0, 1)
                for p in shared
            ]
            assert torch.equal(got, torch.cat(each)), (producer.path, name_)


@pytest.mark.parametrize(
    "architectures",
    [["pipeline"], ["AutoConfig"], ["BertModel"], ["Nothing"], "LlamaForCausalLM", [5], None, []],
    ids=str,
)
def test_architectures_that_do_not_fit_the_model_type_are_not_trusted(architectures):
    config = FAMILIES["llama-mha"].build().config
    config.architectures = architectures
    assert layout.model_class(config) is transformers.LlamaForCausalLM

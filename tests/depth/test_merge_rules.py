"""What a merged layer is: the rules against their definitions, and sums of sums."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from liar_depth import build
from liar_testing import assert_close_rms

from liar_ext.depth import mixture as mixtures
from liar_ext.depth.mixture import HeldSource, Mixture, merged, mixed
from liar_ext.depth.rules import RULES, merge_reference, norm_names, norms_of
from liar_ext.depth.surgery import layer_list


def thetas(count):
    return [torch.randn(5, 7, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("rule", ["rdsc", "telescope"])
def test_of_one_layer_it_is_that_layer(rule):
    base, only = thetas(2)
    assert torch.allclose(RULES[rule].reference([base, only]), only, rtol=0, atol=1e-15)
    assert RULES[rule].coefficients(1) == (0, 1)


def test_rdsc_of_two_layers_is_their_sum_less_the_base():
    base, first, second = thetas(3)
    expected = first + second - base
    assert torch.allclose(RULES["rdsc"].reference([base, first, second]), expected)
    assert RULES["rdsc"].coefficients(2) == (-1, 1, 1)


def test_telescope_is_what_the_published_code_does_in_place():
    """It adds `θ_k − θ` to a θ that it has changed before."""
    layers = thetas(4)
    base = layers[0].clone()
    for theta in layers[1:]:
        base.add_(theta - base)
    assert torch.equal(RULES["telescope"].reference(layers), base)
    assert torch.allclose(base, layers[3])
    assert not torch.allclose(base, RULES["rdsc"].reference(layers))


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("rule", RULES)
def test_what_runs_is_the_definition_with_its_terms_collected(rule, m):
    layers = thetas(m + 1)
    coefficients = RULES[rule].coefficients(m)
    assert sum(coefficients) == 1
    collected = sum(float(c) * theta for c, theta in zip(coefficients, layers, strict=True))
    assert_close_rms(collected, RULES[rule].reference(layers), 1e-14)


def test_norms_are_found_by_their_modules():
    names = {
        name: {n.rpartition(".")[2] for n in norm_names(layer_list(build(name))[1][0])}
        for name in ("llama", "gpt2")
    }
    assert names == {"llama": {"weight"}, "gpt2": {"weight", "bias"}}
    found = norm_names(layer_list(build("qwen3-windows"))[1][0])
    assert found == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    bert = norm_names(layer_list(build("bert"))[1][0])
    assert "attention.output.LayerNorm.bias" in bert
    assert not any("dense" in name for name in bert)


# the published code leaves norms as layer l has them although it takes all else from layer l + m
@pytest.mark.parametrize(
    ("rule", "asked", "expected"),
    [
        ("rdsc", "auto", "base"),
        ("rdsc", "rule", "sum"),
        ("telescope", "auto", "base"),
        ("telescope", "rule", "last"),
        ("mean", "auto", "mean"),
        ("mean", "base", "base"),
    ],
)
def test_what_becomes_of_norms(rule, asked, expected):
    _, layers = layer_list(build("llama"))
    norms = norm_names(layers[0])
    parts = [dict(layer.named_parameters()) for layer in layers[1:4]]
    own = [part["input_layernorm.weight"].double() for part in parts]
    wanted = {
        "base": own[0],
        "last": own[2],
        "sum": own[1] + own[2] - own[0],
        "mean": sum(own) / 3,
    }[expected]
    found = merge_reference(rule, parts, norms, asked)
    assert torch.allclose(found["input_layernorm.weight"], wanted)
    matrix = "mlp.down_proj.weight"
    assert torch.allclose(found[matrix], RULES[rule].reference([part[matrix] for part in parts]))
    mixture = merged([Mixture.of(layer) for layer in (1, 2, 3)], rule, asked)
    assert (mixture.norms == Mixture.of(1).norms) == (norms_of(rule, asked) == "base")


@pytest.mark.parametrize("asked", ["base", "rule"])
@pytest.mark.parametrize("rule", RULES)
def test_a_merge_of_merges_is_a_sum_of_layers_of_the_source(rule, asked, monkeypatch):
    monkeypatch.setattr(mixtures, "PIECE", 100)  # several pieces, the last one shorter
    _, layers = layer_list(build("llama"))
    norms = norm_names(layers[0])
    parts = [dict(layer.named_parameters()) for layer in layers]
    above = merge_reference(rule, parts[2:5], norms, asked)
    expected = merge_reference(rule, [parts[1], above, parts[5]], norms, asked)
    plain = [Mixture.of(layer) for layer in range(6)]
    mixture = merged([plain[1], merged(plain[2:5], rule, asked), plain[5]], rule, asked)
    source = HeldSource(layers)
    for name, parameter in parts[1].items():
        pieces = list(mixed(source, mixture, mixture.terms(name, norms), name))
        assert all(piece.dtype == torch.float32 for piece in pieces)
        assert_close_rms(torch.cat(pieces).view(parameter.shape), expected[name], 1e-7)


def test_sums_are_rounded_once_and_single_layers_not_at_all():
    _, layers = layer_list(build("llama").bfloat16())
    name = "mlp.up_proj.weight"
    values = [layer.get_parameter(name).detach() for layer in layers]
    source = HeldSource(layers)
    total = merged([Mixture.of(layer) for layer in (0, 1, 2, 3)], "rdsc", "auto")
    (found,) = mixed(source, total, total.weights, name)
    exact = values[1].double() + values[2].double() + values[3].double() - 2 * values[0].double()
    assert torch.equal(found, exact.bfloat16().flatten())
    last = merged([Mixture.of(layer) for layer in (0, 1, 2, 3)], "telescope", "auto")
    assert last.weights == ((3, Fraction(1)),)
    (found,) = mixed(source, last, last.weights, name)
    assert torch.equal(found, values[3].flatten())


def test_a_sum_is_in_the_dtype_of_its_place():
    """The base's file says what a merged layer is stored in, whatever the others are."""
    _, layers = layer_list(build("llama"))
    layers[1].bfloat16()
    name = "mlp.up_proj.weight"
    mixture = merged([Mixture.of(0), Mixture.of(1)], "telescope", "auto")
    (found,) = mixed(HeldSource(layers), mixture, mixture.weights, name)
    assert torch.equal(found, layers[1].get_parameter(name).float().flatten())

"""`--ridge auto` where repairs aim at the dense model, by raw activations of both paths."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES
from liar_paths import KINDS, fit, inputs_of, kept_columns, setting, standing, states_at

import liar_ext
from liar_ext import Execution, planning
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.ridge import SLACK
from liar_ext.engine.statistics import HELD_OUT, SitePairs, held_out, segments
from liar_ext.models import adapter_for
from liar_ext.ops import cross_reference, gram_reference
from liar_ext.recipe import RIDGES

SIGNALS = pytest.mark.parametrize("signal", ["dense", "stream"])


def aim_of(signal, dense, there, before, batches):
    """What a Site aims at, without its bias, (T, out) float64."""
    if signal == "dense":
        return inputs_of(dense, before.name, batches).double() @ before.weight().double().T
    heads = before.kind == "heads"
    front, behind = ("front", "between") if heads else ("between", "behind")
    layer, bias = before.layer, before.bias()
    found = states_at(dense, layer, behind, batches) - states_at(there, layer, front, batches)
    return found if bias is None else found - bias.double()


@SIGNALS
@pytest.mark.parametrize("name", ["llama-mha", "gpt2"], ids=["plain", "affine"])
def test_the_ridge_of_a_site_is_what_raw_activations_of_both_paths_say(name, signal, tmp_path):
    family = FAMILIES[name]
    recipe, batches = setting(tmp_path, target_signal=signal, ridge="auto")
    dense, small = family.build(), family.build()
    report = liar_ext.prune(small, batches, recipe)
    numbers = segments(batches, HELD_OUT)
    chosen = held_out(numbers[-1] + 1)
    parts = zip(batches, numbers, strict=True)
    away = torch.cat([torch.full((batch.tokens,), n in chosen) for batch, n in parts])
    assert 0.1 < float(away.double().mean()) < 0.4
    adapter = adapter_for(dense.config)
    assert [(s.layer, s.kind) for s in report.sites] == [(i, k) for i in range(2) for k in KINDS]
    for found in report.sites:
        (before,) = adapter.sites_of(dense, found.layer, (found.kind,))
        (after,) = adapter.sites_of(small, found.layer, (found.kind,))
        there = standing(dense, small, found.layer, found.kind)
        x, keep = inputs_of(there, before.name, batches), kept_columns(before, after)
        aim = aim_of(signal, dense, there, before, batches)
        weight, center = before.weight().detach(), before.bias() is not None
        expected = {}
        for ridge in (float(r) for r in found.held_out):
            new, shift = fit(x[~away], aim[~away], weight, keep, ridge, center)
            error = x[away][:, keep].double() @ new.T - aim[away]
            if shift is not None:
                error = error + shift
            expected[ridge] = float(
                error.square().sum() / (aim[away] - aim[away].mean(0)).square().sum()
            )
        got = {float(ridge): error for ridge, error in found.held_out.items()}
        assert len(got) > 6
        assert got == pytest.approx(expected, rel=5e-3)
        least = min(expected.values())
        assert found.ridge == min(r for r, error in expected.items() if error <= SLACK * least)
        assert found.ridge in RIDGES


@SIGNALS
def test_the_final_fit_has_all_tokens(signal, tmp_path):
    """The first layer's first Site is the one that the chosen number gives."""
    recipe, batches = setting(tmp_path, target_signal=signal, ridge="auto", layers=(0, 1))
    auto, fixed = FAMILIES["llama-mha"].build(), FAMILIES["llama-mha"].build()
    report = liar_ext.prune(auto, batches, recipe)
    again, batches = setting(
        tmp_path, target_signal=signal, ridge=report.sites[0].ridge, layers=(0, 1)
    )
    liar_ext.prune(fixed, batches, again)
    ours, theirs = (m.model.layers[0].self_attn.o_proj.weight for m in (auto, fixed))
    # sums of one segment and of five: float32 roundings, times the condition
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_pairs_are_the_same_with_and_without_a_part_on_its_own(dtype):
    generator = torch.Generator().manual_seed(3)
    options = {"dtype": dtype, "alone": False}
    plain = SitePairs(5, 7, torch.device("cpu"), **options)
    both = SitePairs(5, 7, torch.device("cpu"), **options, held_out=frozenset({1, 3}))
    given = [
        tuple(torch.randn(40 + s, n, generator=generator) for n in (7, 5, 5)) for s in range(4)
    ]
    mask = torch.rand(41, generator=generator) < 0.7
    valid = mask.nonzero().flatten()
    for segment, (x, local, dense) in enumerate(given):
        for one in (plain, both):
            one.add_pair(x, local, dense, valid if segment == 1 else None, segment)
    ranks = Ranks.single()
    whole, held = both.finish_pair(ranks), both.finish_held_pair(ranks)
    expected = plain.finish_pair(ranks)
    assert plain.finish_held_pair(ranks) is None
    assert torch.allclose(whole.drift.pairs.cross, expected.drift.pairs.cross, rtol=1e-6)
    assert torch.equal(whole.drift.pairs.sum_x, expected.drift.pairs.sum_x)
    assert torch.equal(whole.drift.change.squares, expected.drift.change.squares)
    x, local, dense = (torch.cat([given[1][i][mask], given[3][i]]) for i in range(3))
    z = (dense - local).double()
    assert int(held.moments.count) == len(x) == int(held.drift.pairs.count)
    assert held.drift.pairs.cross.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-5}
    triangle = gram_reference(x).gram.tril()
    assert torch.allclose(held.moments.gram.double().tril(), triangle, **close)
    pairs = cross_reference(z, x)
    assert torch.allclose(held.drift.pairs.cross.double(), pairs.cross, **close)
    assert torch.allclose(held.drift.pairs.sum_y, pairs.sum_y, **close)
    for own, raw in ((held.drift.change, z), (held.drift.dense, dense.double())):
        assert torch.allclose(own.sum, raw.sum(0), **close)
        assert torch.allclose(own.squares, raw.square().sum(0), **close)
        assert int(own.count) == len(x)


@SIGNALS
def test_what_keeps_all_its_columns_gets_a_ridge_too(signal, tmp_path):
    recipe, batches = setting(
        tmp_path, target_signal=signal, ridge="auto", allocation="global", sparsity=0.05
    )
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    whole = [site for site in report.sites if site.units_after == site.units_before]
    assert whole
    for site in report.sites:
        assert site.held_out
        assert site.ridge in RIDGES


@SIGNALS
def test_moved_forwards_make_the_same_bytes(signal, tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path, target_signal=signal, ridge="auto")

    def made(name, **options):
        liar_ext.compress(
            tmp_path / "dense", tmp_path / name, recipe, execution=Execution(**options)
        )
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert made("one") == made("two", hidden_states="disk", journal_seconds=0)


@SIGNALS
def test_the_plan_counts_the_choice(signal, tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    rates = dict.fromkeys(("forward", "gram", "solve", "residual"), 1e9)
    found = {}
    for ridge in ("auto", 1e-4):
        recipe, _ = setting(tmp_path, target_signal=signal, ridge=ridge, target=("ffn",))
        found[ridge] = planning.plan(tmp_path / "dense", recipe, rates=rates)
    auto, fixed = found.values()
    assert auto["flops"]["solve"] > 5 * fixed["flops"]["solve"]
    phases = {phase["name"]: phase["device"] for phase in auto["phases"]["all"]}
    # 48 columns and 48 outputs
    site = auto["sites"][0]
    columns, outputs = site["columns_before"], site["outputs"]
    sums = phases["statistics of ffn"]
    assert sums["held_out_sums"] == 8 * columns * (columns + outputs)
    assert phases["repair of ffn"]["held_out_moments"] == 4 * columns * (columns + outputs)
    before = {phase["name"]: phase["device"] for phase in fixed["phases"]["all"]}
    assert phases["repair of ffn"]["repair"] > before["repair of ffn"]["repair"]

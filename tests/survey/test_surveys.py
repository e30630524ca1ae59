"""What surveys find in whole compressions, against raw activations of the dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liar_families import FAMILIES, batches_of, outputs, write_tokens
from torch import Tensor

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.allocation.levels import levels
from liar_ext.calibration import Batch
from liar_ext.costs import layer_flops, unit_costs
from liar_ext.criteria import CRITERIA, Evidence, unit_scores
from liar_ext.engine.repair import Repairer
from liar_ext.models import adapter_for
from liar_ext.ops import gram
from liar_ext.ops.removal import columns, greedy_reference, loss_reference


def setting(tmp_path, **changes):
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": 24,
        "batch_size": 8,
        "sparsity": 0.4,
        "target": ("ffn", "heads"),
    }
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=True)


@pytest.fixture
def findings(monkeypatch) -> dict[tuple[int, str], Tensor]:
    """What the next compression's survey finds, filled as it goes."""
    found: dict[tuple[int, str], Tensor] = {}
    real = Repairer.finding

    def finding(self, survey, site, *rest: Any):
        result = real(self, survey, site, *rest)
        found[site.layer, site.kind] = result[0]
        return result

    monkeypatch.setattr(Repairer, "finding", finding)
    return found


def padded(batches: tuple[Batch, ...]) -> list[Batch]:
    """The same with some positions masked, on the right."""
    made = []
    for number, batch in enumerate(batches):
        mask = torch.ones_like(batch.attention_mask)
        mask[: 3 + number, 15 - number :] = False
        made.append(Batch(batch.input_ids, mask))
    return made


@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
@pytest.mark.parametrize("name", ["llama-gqa-biases", "opt-post-norm", "bert"])
def test_influence_is_one_minus_the_mean_cosine(name, statistics, tmp_path, findings):
    recipe, batches = setting(tmp_path, allocation="influence", statistics=statistics)
    batches = padded(batches) if name == "bert" else batches
    dense = FAMILIES[name].build()
    layers = adapter_for(dense.config).layer_list(dense)[1]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def hook(index: int):
        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            seen[index].append(torch.stack([before.double(), after.double()]))

        return keep

    for index, layer in enumerate(layers):
        layer.register_forward_hook(hook(index), with_kwargs=True)
    for batch in batches:
        outputs(dense, batch.input_ids, attention_mask=batch.attention_mask.long())
    mask = torch.cat([batch.attention_mask.flatten() for batch in batches]).bool()
    liar_ext.prune(FAMILIES[name].build(), batches, recipe)
    # one of a layer: the second Site of it is not looked at again
    assert len(findings) == 2
    for (index, _), found in findings.items():
        before, after = torch.cat([part.flatten(1, 2) for part in seen[index]], 1)[:, mask]
        cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert float(found) == pytest.approx(1 - float(cosines.mean()), abs=1e-6)


@pytest.mark.parametrize("bias", ["always", "never"])
@pytest.mark.parametrize("criterion", ["wanda", "magnitude-producer", "obs"])
def test_levels_are_what_least_squares_leaves(criterion, bias, tmp_path, findings):
    """On raw activations in float64, whichever order the criterion removes units in."""
    recipe, batches = setting(
        tmp_path, allocation="levels", criterion=criterion, bias=bias, ridge=1e-3
    )
    dense = FAMILIES["llama-mha"].build()
    adapter = adapter_for(dense.config)
    sites = {
        (index, kind): adapter.sites_of(dense, index, (kind,))[0]
        for index in range(2)
        for kind in recipe.target
    }
    rows: dict[tuple[int, str], list[Tensor]] = {key: [] for key in sites}
    for key, site in sites.items():
        site.consumer.register_forward_pre_hook(lambda _, args, own=rows[key]: own.append(args[0]))
    for batch in batches:
        outputs(dense, batch.input_ids)
    liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    assert findings.keys() == sites.keys()
    for key, site in sites.items():
        x = torch.cat([part.flatten(0, 1) for part in rows[key]]).double()
        weight = site.weight().double()
        moved = x - x.mean(0) if bias == "always" else x
        covariance = moved.T @ moved / len(x)
        ridged = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        width, units = site.columns_per_unit, site.units
        if CRITERIA[criterion].greedy:
            order = greedy_reference(ridged, weight, width, 1) if units < 9 else None
        else:
            evidence = Evidence(site, gram(x.float()), ridge=1e-3)
            scores = unit_scores(site, CRITERIA[criterion].score(evidence))
            order = scores.argsort().tolist()
        if order is None:
            # one neuron at a time is a cost of its own to write out: tests/ops has it
            assert (findings[key].diff() <= 0).all()
            continue
        energy = (weight @ covariance * weight).sum()
        expected = [
            float(loss_reference(ridged, weight, columns(order[: units - kept], width)) / energy)
            for kept in levels(units)[:-1]
        ]
        assert findings[key].tolist() == pytest.approx([*expected, 0.0], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("allocation", "statistics", "passes"),
    [
        ("uniform", "sequential", 1),
        ("alpha", "sequential", 1),
        ("alpha", "oneshot", 1),
        ("influence", "sequential", 2),
        ("levels", "oneshot", 2),
    ],
)
def test_a_survey_without_tokens_costs_no_forward(allocation, statistics, passes, tmp_path):
    recipe, batches = setting(tmp_path, allocation=allocation, statistics=statistics)
    model = FAMILIES["llama-mha"].build()
    layer, calls = model.model.layers[0], []
    inner = layer.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = wrapped
    liar_ext.prune(model, batches, recipe)
    assert len(calls) == passes * len(batches)


@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
@pytest.mark.parametrize("allocation", ["alpha", "influence", "levels", "kwon", "ranked", "besa"])
def test_the_budget_is_met_in_some_layers(allocation, statistics, tmp_path, monkeypatch):
    monkeypatch.setattr("liar_ext.survey.besa.STEPS", 2)
    recipe, batches = setting(tmp_path, allocation=allocation, statistics=statistics, layers=(1, 2))
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    assert {site.layer for site in report.sites} == {1}
    assert report.totals["sparsity"] == pytest.approx(0.4, abs=0.02)


def test_what_a_survey_raised_is_in_the_report(tmp_path):
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight[1] = linear.weight[0]
    recipe, batches = setting(tmp_path, allocation="levels", ridge=0.0)
    report = liar_ext.prune(model, batches, recipe)
    steps = [step for site in report.sites for step in site.steps]
    assert any(step.startswith("survey: ") and "ridge" in step for step in steps)
    assert any("survey: " in line for line in report.warnings)


def test_hidden_states_that_are_not_finite_name_the_layer(tmp_path):
    recipe, batches = setting(tmp_path, allocation="influence")
    model = FAMILIES["llama-mha"].build()
    model.model.layers[1].mlp.act_fn.forward = lambda x: torch.full_like(x, float("nan"))
    with pytest.raises(InputError, match=r"model.layers.1: hidden states are NaN"):
        liar_ext.prune(model, batches, recipe)


def test_a_budget_that_cannot_be_met_is_refused_before_the_survey(tmp_path, findings):
    recipe, batches = setting(tmp_path, target=("heads",), sparsity=0.8, allocation="kwon")
    model = FAMILIES["llama-mha"].build()
    expected = outputs(model)
    with pytest.raises(InputError, match="at most 0.75 can be removed"):
        liar_ext.prune(model, batches, recipe)
    assert not findings
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("name", ["llama-gqa-biases", "gpt2", "bert", "qwen3"])
def test_a_unit_costs_what_the_layers_flops_fall_by(name):
    model = FAMILIES[name].build()
    adapter = adapter_for(model.config)
    for kind in ("ffn", "heads"):
        before = layer_flops(model, adapter, 23)[0]
        site = adapter.sites_of(model, 0, (kind,))[0]
        cost = unit_costs(site, adapter.decoder, 23)["flops"]
        site.shrink(torch.arange(site.units - 2))
        assert layer_flops(model, adapter, 23)[0] == before - 2 * cost


@pytest.mark.parametrize("allocation", ["uniform", "global", "kwon", "levels", "ranked", "besa"])
def test_a_budget_in_flops_is_met_and_reported(allocation, tmp_path, monkeypatch):
    monkeypatch.setattr("liar_ext.survey.besa.STEPS", 2)
    recipe, batches = setting(tmp_path, budget="flops", allocation=allocation, sparsity=0.45)
    model = FAMILIES["llama-gqa-biases"].build()
    adapter = adapter_for(model.config)
    before = sum(layer_flops(model, adapter, 24))
    totals = liar_ext.prune(model, batches, recipe).totals
    removed = totals["site_flops_before"] - totals["site_flops_after"]
    assert before - sum(layer_flops(model, adapter, 24)) == removed
    assert totals["sparsity"] == removed / totals["site_flops_before"]
    assert totals["sparsity"] == pytest.approx(0.45, abs=0.01)
    parameters = totals["parameters_before"] - totals["parameters_after"]
    # biases of the producers go, too
    assert totals["site_parameters_before"] - totals["site_parameters_after"] == parameters

"""What a compression does to a model, seen from outside."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from liar_families import FAMILIES, batches_of, outputs, write_tokens

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.models import adapter_for, linear
from liar_ext.ops import residual_reference


def setting(tmp_path, **changes):
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": 24,
        "batch_size": 8,
        "sparsity": 0.5,
    }
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=True)


def silence(model, units, kinds=("ffn",)):
    """Make the given units of every layer output exactly zero."""
    adapter = adapter_for(model.config)
    with torch.no_grad():
        for index in range(len(adapter.layer_list(model)[1])):
            for site in adapter.sites_of(model, index, kinds):
                for producer in site.spec.producers:
                    linear = site.module.get_submodule(producer.path)
                    width = linear.weight.shape[0] // site.units
                    for unit in units:
                        linear.weight[unit * width : (unit + 1) * width] = 0
                        if linear.bias is not None:
                            linear.bias[unit * width : (unit + 1) * width] = 0


@pytest.mark.parametrize("reconstruct", ["none", "bias", "liar"])
@pytest.mark.parametrize("name", ["llama-gqa-biases", "qwen2", "qwen3"])
def test_removing_what_does_nothing_changes_nothing(name, reconstruct, tmp_path):
    recipe, batches = setting(
        tmp_path, target=("ffn", "heads"), reconstruct=reconstruct, criterion="wanda"
    )
    model = FAMILIES[name].build()
    silence(model, range(0, 48, 2))
    silence(model, (1, 2), ("heads",))
    expected = outputs(model)
    report = liar_ext.prune(model, batches, recipe)
    assert {s.units_after for s in report.sites if s.kind == "ffn"} == {24}
    assert {s.units_after for s in report.sites if s.kind == "heads"} == {2}
    assert all(site.relative_residual < 1e-9 for site in report.sites)
    assert float((outputs(model) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("bias", ["always", "never"])
def test_liar_restores_twins_exactly(bias, tmp_path):
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[24:] = linear.weight[:24]
            # the twins are the weaker half, so they are the ones to go
            layer.mlp.down_proj.weight[:, 24:] *= 0.01
    expected = outputs(model)
    recipe, batches = setting(tmp_path, criterion="magnitude", bias=bias, ridge=1e-9)
    plain, _ = setting(tmp_path, criterion="magnitude", reconstruct="none")
    broken = FAMILIES["llama-mha"].build()
    broken.load_state_dict(model.state_dict())
    liar_ext.prune(broken, batches, plain)
    liar_ext.prune(model, batches, recipe)
    error = float((outputs(model) - expected).abs().max())
    assert error < 1e-3 * float(expected.abs().max())
    assert error < 0.2 * float((outputs(broken) - expected).abs().max())


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "flap", "random"])
def test_liar_has_the_lowest_residual_for_every_criterion(criterion, tmp_path):
    residuals = {}
    # oneshot: only then do the three repairs of a Site see the same inputs
    for name in ("none", "bias", "liar"):
        recipe, batches = setting(
            tmp_path,
            criterion=criterion,
            statistics="oneshot",
            reconstruct=name,
            bias="auto",
            target=("ffn", "heads"),
            ridge=1e-6,
        )
        report = liar_ext.prune(FAMILIES["opt"].build(), batches, recipe)
        residuals[name] = {site.name: site.relative_residual for site in report.sites}
    for site, value in residuals["liar"].items():
        assert value <= residuals["bias"][site] * (1 + 1e-9)
        assert value <= residuals["none"][site] * (1 + 1e-9)


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path):
    states = []
    for seed in (0, 0, 1):
        recipe, batches = setting(tmp_path, criterion="random", seed=seed)
        model = FAMILIES["llama-mha"].build()
        liar_ext.prune(model, batches, recipe)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_the_batch_size_does_not_matter(batch_size, tmp_path):
    results = []
    for size in (8, batch_size):
        recipe, batches = setting(tmp_path, batch_size=size, target=("ffn", "heads"))
        model = FAMILIES["qwen3-mixed"].build()
        liar_ext.prune(model, batches, recipe)
        results.append(outputs(model))
    assert float((results[0] - results[1]).abs().max()) < 1e-3 * float(results[0].abs().max())


def test_batches_may_be_tensors_or_mappings(tmp_path):
    recipe, batches = setting(tmp_path)
    results = []
    for form in (
        batches,
        [batch.input_ids for batch in batches],
        [{"input_ids": b.input_ids, "attention_mask": b.attention_mask.long()} for b in batches],
    ):
        model = FAMILIES["llama-mha"].build()
        liar_ext.prune(model, form, recipe)
        results.append(outputs(model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_model_keeps_its_mode_and_its_gradients_flags(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build().train()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    liar_ext.prune(model, batches, recipe)
    assert model.training
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not flags.pop("model.layers.0.mlp.down_proj.weight")
    assert all(flags.values())


def test_a_budget_the_grid_cannot_meet_is_a_warning_with_both_numbers(tmp_path):
    recipe, batches = setting(tmp_path, target=("heads",), sparsity=0.35)
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    assert report.totals["sparsity"] == 0.25
    assert any("0.350" in line and "0.250" in line for line in report.warnings)


def test_an_ill_conditioned_site_reports_the_raised_ridge(tmp_path):
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight[1] = linear.weight[0]
            linear.weight[2] = linear.weight[0]
    # magnitude keeps the twins
    model.model.layers[0].mlp.down_proj.weight.data[:, :3] = 5.0
    recipe, batches = setting(tmp_path, ridge=0.0, criterion="magnitude")
    report = liar_ext.prune(model, batches, recipe)
    first = next(site for site in report.sites if site.layer == 0)
    assert first.ridge == 0.0
    assert first.ridge_used > 0.0
    assert first.steps
    assert any(first.name in warning for warning in report.warnings)


def test_too_few_tokens_are_refused_before_anything_changes(tmp_path):
    recipe, batches = setting(tmp_path, samples=1)
    model = FAMILIES["llama-mha"].build()
    expected = outputs(model)
    with pytest.raises(InputError, match="24 calibration tokens for 48 columns"):
        liar_ext.prune(model, batches, recipe)
    assert torch.equal(outputs(model), expected)
    liar_ext.prune(model, batches, Recipe.from_json({**recipe.to_json(), "reconstruct": "none"}))


def test_a_model_with_its_own_layout_is_not_pruned_twice(tmp_path):
    recipe, batches = setting(tmp_path, allocation="global", target=("ffn", "heads"))
    model = FAMILIES["gpt2"].build()
    liar_ext.prune(model, batches, recipe)
    with pytest.raises(InputError, match="dense"):
        liar_ext.prune(model, batches, recipe)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_budget_is_met(allocation, sparsity, tmp_path):
    recipe, batches = setting(tmp_path, allocation=allocation, sparsity=sparsity)
    model = FAMILIES["llama-mha"].build()
    dense = sum(p.numel() for p in model.parameters())
    report = liar_ext.prune(model, batches, recipe)
    assert report.totals["sparsity"] == pytest.approx(sparsity, abs=0.011)
    assert report.totals["parameters_before"] == dense
    assert report.totals["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert min(site.units_after for site in report.sites) >= 1


@pytest.mark.parametrize("reconstruct", ["none", "bias", "liar"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-mha"])
def test_the_reported_residual_is_the_measured_one(name, reconstruct, tmp_path):
    recipe, batches = setting(
        tmp_path, target=("ffn", "heads"), reconstruct=reconstruct, statistics="oneshot"
    )
    dense, small = FAMILIES[name].build(), FAMILIES[name].build()
    report = liar_ext.prune(small, batches, recipe)
    adapter = adapter_for(dense.config)
    rows = {site.name: [] for site in report.sites}
    for path in rows:
        module = dense.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, seen=rows[path]: seen.append(args[0]))
    for batch in batches:
        outputs(dense, batch.input_ids)
    for found in report.sites:
        (before,) = adapter.sites_of(dense, found.layer, (found.kind,))
        (after,) = adapter.sites_of(small, found.layer, (found.kind,))
        x = torch.cat([part.flatten(0, -2) for part in rows[found.name]])
        keep = kept_units(before, after)
        old, new = before.bias(), after.bias()
        shift = None if new is None else new - (0 if old is None else old)
        expected = residual_reference(x, before.weight(), keep, after.weight(), shift)
        assert found.relative_residual == pytest.approx(expected, rel=1e-3, abs=1e-6)


def kept_units(before, after):
    """Columns that a Site kept, found again by its first producer's rows."""
    producer = before.spec.producers[-1]
    wide = linear.weight(before.module.get_submodule(producer.path))
    narrow = linear.weight(after.module.get_submodule(producer.path))
    wide, narrow = (
        w.unflatten(0, (producer.segments, -1))[producer.segment] for w in (wide, narrow)
    )
    return torch.cdist(narrow, wide).argmin(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site(value, tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    model.model.layers[1].mlp.act_fn.forward = lambda x: torch.full_like(x, value)
    with pytest.raises(InputError, match="model.layers.1.mlp.down_proj: 48 of 48 input columns"):
        liar_ext.prune(model, batches, recipe)


def test_weights_that_are_not_finite_are_named(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["bert"].build()
    model.encoder.layer[1].output.LayerNorm.bias.data[3] = float("nan")
    with pytest.raises(InputError, match="encoder.layer.1.output.LayerNorm.bias: has NaN"):
        liar_ext.prune(model, batches, recipe)


def test_sequential_aims_at_the_pruned_path_and_oneshot_at_the_dense_one(tmp_path):
    """The last Site of the model fits the inputs it will get."""
    errors = {}
    for statistics in ("sequential", "oneshot"):
        recipe, batches = setting(
            tmp_path, statistics=statistics, target=("ffn", "heads"), criterion="magnitude"
        )
        model = FAMILIES["gpt2"].build()
        last = model.transformer.h[1].mlp.c_proj
        weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
        liar_ext.prune(model, batches, recipe)
        seen = []
        model.transformer.h[1].mlp.c_fc.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        made = []
        last.register_forward_hook(lambda *call, made=made: made.append(call[2]))
        dense = FAMILIES["gpt2"].build().transformer.h[1].mlp
        for batch in batches:
            outputs(model, batch.input_ids)
        with torch.no_grad():
            wanted = torch.cat([dense.act(dense.c_fc(x)) @ weight + bias for x in seen])
        errors[statistics] = float((torch.cat(made) - wanted).square().mean())
    assert errors["sequential"] < errors["oneshot"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_memory_is_close_to_float32(dtype, tmp_path):
    results = []
    for wanted in (torch.float32, dtype):
        recipe, batches = setting(tmp_path, target=("ffn", "heads"), bias="always")
        model = FAMILIES["llama-gqa-biases"].build().to(dtype).to(wanted)
        liar_ext.prune(model, batches, recipe)
        assert {p.dtype for p in model.parameters()} == {wanted}
        results.append(outputs(model))
    error = (results[1] - results[0]).square().mean().sqrt() / results[0].std()
    assert float(error) < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_random_scores_are_the_same_in_both_passes_of_a_global_allocation(tmp_path):
    """What a Site keeps depends on how many units it keeps, not on the allocation."""
    kept = []
    for allocation in ("uniform", "global"):
        recipe, batches = setting(tmp_path, criterion="random", allocation=allocation)
        dense, small = FAMILIES["opt"].build(), FAMILIES["opt"].build()
        liar_ext.prune(small, batches, recipe)
        adapter = adapter_for(dense.config)
        kept.append(
            [
                set(kept_units(*(adapter.sites_of(m, i, ("ffn",))[0] for m in (dense, small))))
                for i in range(2)
            ]
        )
    for first, second in zip(*kept, strict=True):
        few, many = sorted((set(map(int, first)), set(map(int, second))), key=len)
        assert few <= many


@pytest.mark.parametrize("reconstruct", ["none", "liar"])
@pytest.mark.parametrize("name", ["opt", "llama-gqa-biases", "mistral-gqa"])
def test_bias_never_touches_and_adds_none(name, reconstruct, tmp_path):
    recipe, batches = setting(
        tmp_path, bias="never", reconstruct=reconstruct, target=("ffn", "heads")
    )
    dense, small = FAMILIES[name].build(), FAMILIES[name].build()
    liar_ext.prune(small, batches, recipe)
    adapter = adapter_for(dense.config)
    for index in range(2):
        for before, after in zip(
            *(adapter.sites_of(m, index, ("heads", "ffn")) for m in (dense, small)), strict=True
        ):
            assert (before.bias() is None) == (after.bias() is None)
            assert before.bias() is None or torch.equal(before.bias(), after.bias())


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_means_far_above_the_deviations_move_the_statistics_to_float64(shift, tmp_path):
    """Centred in float32, G of such columns is rounding, and so is the residual reported."""
    recipe, batches = setting(tmp_path, reconstruct="liar", bias="always", criterion="magnitude")
    model = FAMILIES["opt"].build()
    layer = model.model.decoder.layers[1]
    layer.fc1.weight.data *= 0.1
    layer.fc1.bias.data = 0.1 * layer.fc1.bias.data + shift
    report = liar_ext.prune(model, batches, recipe)
    site = report.sites[-1]
    assert any("float64" in step for step in site.steps) == (shift > 0)
    assert any("float64" in line for line in report.warnings) == (shift > 0)
    if shift:
        # relu never bends here: the columns are affine in 32 inputs, and 24 of them predict well
        assert 0 < site.relative_residual < 1


def test_a_head_made_from_a_headless_checkpoint_is_saved_as_what_it_is(tmp_path):
    source = FAMILIES["bert"].build()
    source.save_pretrained(tmp_path / "headless")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "headless")
    assert model.config.architectures == ["BertModel"]
    recipe, batches = setting(tmp_path)
    report = liar_ext.prune(model.eval(), batches, recipe)
    liar_ext.save(model, tmp_path / "small", report)
    loaded = liar_ext.load(tmp_path / "small")
    assert type(loaded) is transformers.BertForSequenceClassification
    assert torch.equal(outputs(loaded), outputs(model))


def test_repaired_weights_that_do_not_fit_the_dtype_are_refused(tmp_path, monkeypatch):
    from liar_ext.engine.repair import Repairer

    real = Repairer._solve

    def huge(self, *args):
        repaired, *rest = real(self, *args)
        return dataclasses.replace(repaired, weight=repaired.weight * 1e6), *rest

    monkeypatch.setattr(Repairer, "_solve", huge)
    recipe, batches = setting(tmp_path)
    with pytest.raises(InputError, match="do not fit torch.float16"):
        liar_ext.prune(FAMILIES["llama-mha"].build().half(), batches, recipe)


def test_a_grid_that_removes_nothing_is_refused(tmp_path):
    recipe, batches = setting(tmp_path, sparsity=0.3, round_to=64)
    with pytest.raises(InputError, match="removes nothing"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)


@pytest.mark.parametrize(
    ("batch", "says"),
    [("text", "is a str"), ({"ids": 1}, "is a dict"), (torch.full((1, 60), 97), "token id 97")],
)
def test_batches_that_are_none_are_named(batch, says, tmp_path):
    recipe, _ = setting(tmp_path)
    with pytest.raises(InputError, match=says):
        liar_ext.prune(FAMILIES["llama-mha"].build(), [batch], recipe)


def test_a_forward_of_the_layers_own_is_used_and_kept(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    layer, calls = model.model.layers[0], []
    inner = layer.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = wrapped
    liar_ext.prune(model, batches, recipe)
    assert layer.forward is wrapped
    assert len(calls) == len(batches)

"""`--target-signal dense`: repairs that aim at the dense model's own outputs, from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, outputs, tree_hash
from liar_paths import inputs_of, kept_columns, setting, standing
from liar_testing import assert_close_rms

import liar_ext
from liar_ext import Execution, InputError, Recipe
from liar_ext.engine import capture
from liar_ext.engine.driver import Driver
from liar_ext.engine.pairs import PairMeasurer, PairStream
from liar_ext.models import adapter_for
from liar_ext.ops import drift_reference, drift_residual_reference

KINDS = ("heads", "ffn")


@pytest.mark.parametrize("bias", ["auto", "always"])
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-biases", "gpt2", "opt", "bert"])
def test_every_site_is_the_fit_to_the_dense_model_by_hooks(name, bias, tmp_path):
    family = FAMILIES[name]
    recipe, batches = setting(tmp_path, decoder=family.decoder, bias=bias)
    dense, small = family.build(), family.build()
    report = liar_ext.prune(small, batches, recipe)
    adapter = adapter_for(dense.config)
    assert [(s.layer, s.kind) for s in report.sites] == [(i, k) for i in range(2) for k in KINDS]
    for found in report.sites:
        (before,) = adapter.sites_of(dense, found.layer, (found.kind,))
        (after,) = adapter.sites_of(small, found.layer, (found.kind,))
        path = before.name
        x = inputs_of(standing(dense, small, found.layer, found.kind), path, batches)
        wanted, keep = inputs_of(dense, path, batches), kept_columns(before, after)
        old, new = before.bias(), after.bias()
        center = new is not None
        weight, shift = drift_reference(wanted, x, before.weight(), keep, recipe.ridge, center)
        # what float32 sums allow a local repair, too: their rounding, seen from the variances,
        # times the condition
        excess = float(x.square().mean(0).sum() / x.var(0).sum())
        assert_close_rms(after.weight(), weight, 2e-7 * found.condition * excess)
        moved = None
        if new is not None:
            moved = new - (0 if old is None else old)
            assert float((moved - shift).abs().max()) < 1e-3 * float(weight.norm(dim=1).max())
        expected = drift_residual_reference(wanted, x, before.weight(), keep, after.weight(), moved)
        assert found.relative_residual == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layers", [(0, 2), (1, 2)], ids=["all layers", "the last layer"])
def test_where_nothing_has_drifted_it_is_local(layers, tmp_path, monkeypatch):
    drifts = []
    real = PairMeasurer._standing

    def watched(self, *args):
        measured = real(self, *args)
        drifts.append(measured.drift)
        return measured

    monkeypatch.setattr(PairMeasurer, "_standing", watched)
    found = {}
    for signal in ("local", "dense"):
        recipe, batches = setting(tmp_path, target_signal=signal, layers=layers)
        model = FAMILIES["llama-mha"].build()
        report = liar_ext.prune(model, batches, recipe)
        consumers = [model.get_submodule(site.name).weight for site in report.sites]
        found[signal] = (consumers, [site.relative_residual for site in report.sites])
    (local, left), (dense, remains) = found["local"], found["dense"]
    assert float(drifts[0].change.squares.abs().max()) == 0.0, "the same bits on both paths"
    assert all(float(drift.change.squares.max()) > 0 for drift in drifts[1:])
    assert_close_rms(dense[0], local[0], 1e-6)
    assert remains[0] == pytest.approx(left[0], rel=1e-4)
    assert all(not torch.equal(d, o) for d, o in zip(dense[1:], local[1:], strict=True))


def test_it_brings_the_outputs_closer_to_the_dense_ones(tmp_path):
    """On the calibration tokens, where the fit is."""
    errors = {}
    dense = FAMILIES["opt"].build()
    for signal in ("local", "dense"):
        recipe, batches = setting(tmp_path, target_signal=signal, ridge=1e-4, sparsity=0.3)
        small = FAMILIES["opt"].build()
        liar_ext.prune(small, batches, recipe)
        pairs = [(outputs(m, b.input_ids) for m in (small, dense)) for b in batches]
        errors[signal] = sum(float((one - other).square().sum()) for one, other in pairs)
    assert errors["dense"] < errors["local"]


NAMES = ("llama-gqa-biases", "qwen3-mixed", "opt-post-norm", "gpt2", "bert")


@pytest.mark.parametrize("name", NAMES)
def test_the_place_of_hidden_states_does_not_show_in_the_result(name, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)  # tiny models have only small tensors
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path)
    trees = {}
    for place in ("device", "disk"):
        execution = Execution(hidden_states=place)
        liar_ext.compress(tmp_path / "dense", tmp_path / place, recipe, execution=execution)
        found = tree_hash(tmp_path / place)
        trees[place] = {path: one for path, one in found.items() if "report" not in path}
    assert trees["device"] == trees["disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "device", "disk", "t.npy"]


def test_nothing_is_left_on_the_shelf(tmp_path, monkeypatch):
    """What waits is freed as soon as nobody needs it."""
    files: list[list[str]] = []
    real = Driver._keep

    def counting(self, *args):
        files.append(sorted(path.name for path in self.runtime.shelf._folder.iterdir()))
        assert not self._stream._outputs
        real(self, *args)

    monkeypatch.setattr(Driver, "_keep", counting)
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, batches = setting(tmp_path)
    execution = Execution(hidden_states="disk")
    liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=execution)
    # after the first layer there are states of both paths, after the last one none
    assert [len(names) for names in files] == [2 * len(batches), 0]


def test_a_snapshot_holds_both_paths(tmp_path):
    kept: list[dict[str, object]] = []
    real = Driver._keep

    def watching(self, *args):
        kept.append(dict(self._stream.kept()))
        real(self, *args)

    recipe, batches = setting(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Driver, "_keep", watching)
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    numbers = range(len(batches))
    assert list(kept[0]) == [*map(str, numbers), *(f"{n}-dense" for n in numbers)]
    assert kept[1] == {}


def test_each_batch_passes_a_layer_twice_and_no_more(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    liar_ext.prune(model, batches, recipe)
    # and once to record the layer's arguments, where nothing is computed
    assert len(calls) == 2 * (2 + 1) * len(batches)


def test_a_global_allocation_scores_on_one_path_first(tmp_path):
    recipe, batches = setting(tmp_path, allocation="global", sparsity=0.4)
    report = liar_ext.prune(FAMILIES["gpt2"].build(), batches, recipe)
    assert report.totals["sparsity"] == pytest.approx(0.4, abs=0.05)
    assert all(0 < site.relative_residual < 1 for site in report.sites)


def test_means_far_above_the_deviations_move_both_statistics_to_float64(tmp_path, monkeypatch):
    recipe, batches = setting(tmp_path, target=("ffn",), bias="always", criterion="magnitude")
    model = FAMILIES["opt"].build()
    layer = model.model.decoder.layers[1]
    layer.fc1.weight.data *= 0.1
    layer.fc1.bias.data = 0.1 * layer.fc1.bias.data + 300.0
    report = liar_ext.prune(model, batches, recipe)
    assert any("float64" in step for step in report.sites[-1].steps)
    assert 0 < report.sites[-1].relative_residual < 1


def test_a_dense_path_that_overflows_is_named(tmp_path, monkeypatch):
    real = PairStream._hand

    def broken(self, accumulator, site, number, x):
        for item in self._outputs.values():
            item.fetch()[..., 0] = float("inf")
        real(self, accumulator, site, number, x)

    monkeypatch.setattr(PairStream, "_hand", broken)
    recipe, batches = setting(tmp_path)
    with pytest.raises(InputError, match=r"self_attn\.o_proj: 1 of 32 outputs are NaN or infinite"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)


def test_the_recipe_is_in_the_folder(tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path)
    liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    assert Recipe.read(Path(tmp_path / "out" / "recipe.json")) == recipe

"""Suspended forwards: one pass a layer, and what it sees is what the model computes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from liar_families import FAMILIES, batches_of, outputs, probe_tokens, write_tokens
from liar_testing import assert_close_rms
from torch import Tensor

import liar_ext
from liar_ext import Recipe
from liar_ext.calibration.batch import Batch
from liar_ext.engine.calls import record_calls
from liar_ext.engine.capture import LayerRun, pausing
from liar_ext.engine.repair import Repairer
from liar_ext.engine.shelf import DeviceShelf
from liar_ext.models import adapter_for
from liar_ext.ops import Moments, gram_reference

NAMES = (
    "llama-gqa-biases",
    "qwen3-mixed",
    "mistral-sliding",
    "opt",
    "opt-post-norm",
    "gpt2",
    "bert",
    "roberta",
    "distilbert",
    "llava",
)


def hooked(model: Any, batches: Any) -> dict[str, Tensor]:
    """Inputs of all consumers in a plain forward of the whole model, valid tokens only."""
    adapter = adapter_for(model.config)
    count = len(adapter.layer_list(model)[1])
    sites = [s for i in range(count) for s in adapter.sites_of(model, i, ("heads", "ffn"))]
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    handles = [
        site.consumer.register_forward_pre_hook(
            lambda module, args, name=site.name: seen[name].append(args[0].flatten(0, -2))
        )
        for site in sites
    ]
    backbone = adapter.backbone(model)[1]
    masks = []
    with torch.no_grad():
        for batch in batches:
            backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            masks.append(batch.attention_mask.flatten())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows)[torch.cat(masks)] for name, rows in seen.items()}


@pytest.fixture
def kept_columns() -> dict[str, Tensor]:
    """The columns that each Site keeps, by name; `moments_seen` fills it."""
    return {}


@pytest.fixture
def moments_seen(
    monkeypatch: pytest.MonkeyPatch, kept_columns: dict[str, Tensor]
) -> dict[str, Moments]:
    """The Moments of every Site the driver repairs, by name."""
    seen: dict[str, Moments] = {}
    real = Repairer._solve

    def solve(self: Any, site: Any, moments: Moments, keep: Tensor, *rest: Any) -> Any:
        seen[site.name] = moments
        kept_columns[site.name] = keep
        return real(self, site, moments, keep, *rest)

    monkeypatch.setattr(Repairer, "_solve", solve)
    return seen


def check(moments: Moments, x: Tensor) -> None:
    expected = gram_reference(x)
    assert int(moments.count) == x.shape[0]
    actual, wanted = moments.gram.tril().double(), expected.gram.tril()
    assert float((actual - wanted).norm() / wanted.norm()) < 1e-5
    scale = float(expected.diagonal().sqrt().mean()) * x.shape[0]
    assert float((moments.sum - expected.sum).abs().max()) < 1e-5 * scale


def padded(ids: Tensor) -> tuple[Batch, ...]:
    """Sentences of several lengths, padded by ids that no statistic may see."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row in range(ids.shape[0]):
        mask[row, 8 + row % 16 :] = False
    return tuple(
        Batch(i, m) for i, m in zip(ids.masked_fill(~mask, 1).split(8), mask.split(8), strict=True)
    )


def calibration(name: str, tmp_path: Any) -> tuple[Recipe, tuple[Batch, ...]]:
    family = FAMILIES[name]
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "t.npy")),
        sparsity=0.5,
        target=("ffn", "heads"),
        samples=24,
        seq_len=24,
        batch_size=8,
    )
    if family.decoder:
        return recipe, batches_of(recipe, decoder=True)
    return recipe, padded(probe_tokens(40, 24))


@pytest.mark.parametrize("name", NAMES)
def test_oneshot_sees_what_a_plain_forward_of_the_dense_model_sees(name, tmp_path, moments_seen):
    recipe, batches = calibration(name, tmp_path)
    expected = hooked(FAMILIES[name].build(), batches)
    recipe = Recipe.from_json({**recipe.to_json(), "statistics": "oneshot"})
    liar_ext.prune(FAMILIES[name].build(), batches, recipe)
    assert moments_seen.keys() == expected.keys()
    for site, moments in moments_seen.items():
        check(moments, expected[site])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mistral-sliding", "qwen3-mixed", "opt", "gpt2", "roberta"])
def test_padded_batches_are_seen_as_a_plain_forward_sees_them(name, side, tmp_path, moments_seen):
    """OPT and RoBERTa count positions by the mask, sliding windows cross the padding."""
    recipe, _ = calibration(name, tmp_path)
    batches = padded(probe_tokens(40, 24))
    if side == "left":
        batches = tuple(Batch(b.input_ids.flip(1), b.attention_mask.flip(1)) for b in batches)
    expected = hooked(FAMILIES[name].build(), batches)
    recipe = Recipe.from_json({**recipe.to_json(), "statistics": "oneshot"})
    liar_ext.prune(FAMILIES[name].build(), batches, recipe)
    for site, moments in moments_seen.items():
        check(moments, expected[site])


@pytest.mark.parametrize("name", NAMES)
def test_sequential_sees_what_the_pruned_model_computes(name, tmp_path, moments_seen, kept_columns):
    recipe, batches = calibration(name, tmp_path)
    model = FAMILIES[name].build()
    liar_ext.prune(model, batches, recipe)
    pruned = hooked(model, batches)
    assert moments_seen.keys() == pruned.keys()
    for site, moments in moments_seen.items():
        # the Site itself was narrowed afterwards: compare the columns that stayed
        expected, keep = gram_reference(pruned[site]), kept_columns[site]
        assert int(moments.count) == int(expected.count)
        here = torch.arange(expected.columns)
        assert_close_rms(moments.second(keep, keep), expected.second(here, here), 1e-4)
        assert_close_rms(moments.mean()[keep], expected.mean(), 1e-4)


def test_padding_changes_no_statistic(tmp_path, moments_seen):
    recipe, _ = calibration("bert", tmp_path)
    ids = probe_tokens(40, 12)
    short = tuple(Batch(i, torch.ones_like(i, dtype=torch.bool)) for i in ids.split(8))
    wide = torch.cat([ids, torch.full((40, 6), 5)], 1)
    mask = torch.ones_like(wide, dtype=torch.bool)
    mask[:, 12:] = False
    long = tuple(Batch(i, m) for i, m in zip(wide.split(8), mask.split(8), strict=True))
    models = []
    for batches in (short, long):
        model = FAMILIES["bert"].build()
        liar_ext.prune(model, batches, recipe)
        models.append(outputs(model))
        assert all(int(m.count) == 40 * 12 for m in moments_seen.values())
    assert float((models[0] - models[1]).abs().max()) < 1e-4 * float(models[0].abs().max())


def test_each_layer_is_called_once_for_each_batch(tmp_path, monkeypatch):
    recipe, batches = calibration("llama-mha", tmp_path)
    model = FAMILIES["llama-mha"].build()
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    liar_ext.prune(model, batches, recipe)
    assert len(calls) == len(batches) * len(model.model.layers)


def run_of(model: Any, batch: Batch) -> tuple[LayerRun, Any]:
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    hidden, recorded = record_calls(
        adapter.backbone(model)[1], layers, batch, torch.device("cpu"), {"use_cache": False}
    )
    sites = adapter.sites_of(model, 0, ("ffn",))
    shelf = DeviceShelf()
    return LayerRun(layers[0], shelf.put(hidden), recorded[0], shelf), sites


@torch.no_grad()
def test_a_run_that_is_closed_frees_what_it_captured():
    model = FAMILIES["llama-mha"].build()
    ids = probe_tokens()
    run, sites = run_of(model, Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    with pausing(sites):
        _, x = run.to_next()
        watch = weakref.ref(x)
        del x
        gc.collect()
        assert watch() is not None, "a paused run keeps its input"
        run.close()
    gc.collect()
    assert watch() is None


@torch.no_grad()
def test_calls_outside_a_run_are_not_paused():
    model = FAMILIES["llama-mha"].build()
    ids = probe_tokens()
    _, sites = run_of(model, Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    expected = outputs(model)
    with pausing(sites):
        assert torch.equal(outputs(model), expected)
    assert not sites[0].consumer._forward_pre_hooks


def test_an_error_inside_a_layer_comes_out_and_leaves_no_hooks(tmp_path, monkeypatch):
    recipe, batches = calibration("llama-mha", tmp_path)
    model = FAMILIES["llama-mha"].build()

    def broken(*_: Any, **__: Any) -> Tensor:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(ZeroDivisionError, match="inside"):
        liar_ext.prune(model, batches, recipe)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module) or module is model.model.layers[1].mlp

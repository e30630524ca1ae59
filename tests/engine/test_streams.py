"""`--target-signal stream`: repairs that aim at the dense model's residual stream, from outside."""

from __future__ import annotations

import pytest
import torch
from liar_families import FAMILIES, outputs, tree_hash
from liar_paths import fit, inputs_of, kept_columns, setting, standing, states_at
from liar_testing import assert_close_rms

import liar_ext
from liar_ext import Execution, InputError, planning
from liar_ext.engine import capture
from liar_ext.engine.driver import Driver
from liar_ext.models import adapter_for

KINDS = ("heads", "ffn")
NAMES = (
    *("llama-mha", "llama-gqa-biases", "gpt2", "opt"),
    # a fused projection; what is said is multiplied before it is added; attention and FFN beside
    # each other
    *("phi3", "granite", "gpt_neox", "falcon-one-norm"),
)


@pytest.mark.parametrize("target", [KINDS, ("ffn",), ("heads",)], ids=",".join)
@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_the_fit_to_the_dense_stream_by_hooks(name, target, tmp_path):
    family = FAMILIES[name]
    recipe, batches = setting(tmp_path, target_signal="stream", target=target)
    dense, small = family.build(), family.build()
    report = liar_ext.prune(small, batches, recipe)
    adapter = adapter_for(dense.config)
    assert len(report.sites) == 2 * len(target)
    for found in report.sites:
        (before,) = adapter.sites_of(dense, found.layer, (found.kind,))
        (after,) = adapter.sites_of(small, found.layer, (found.kind,))
        there = standing(dense, small, found.layer, found.kind)
        x, keep = inputs_of(there, before.name, batches), kept_columns(before, after)
        front, behind = ("front", "between") if found.kind == "heads" else ("between", "behind")
        aim = states_at(dense, found.layer, behind, batches)
        aim = (aim - states_at(there, found.layer, front, batches)) / adapter.scale
        old, new = before.bias(), after.bias()
        center = new is not None
        weight, shift = fit(
            x, aim - (0 if old is None else old.double()), before.weight(), keep, 1e-3, center
        )
        excess = float(x.square().mean(0).sum() / x.var(0).sum())
        assert_close_rms(after.weight(), weight, 2e-7 * found.condition * excess)
        error = x[:, keep].double() @ after.weight().double().T - aim
        if new is not None:
            moved = new - (0 if old is None else old)
            assert float((moved - shift).abs().max()) < 1e-3 * float(weight.norm(dim=1).max())
            error += new.double()
        expected = float(error.square().sum() / (aim - aim.mean(0)).square().sum())
        assert found.relative_residual == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-gqa-biases", "gpt2", "opt"])
@pytest.mark.parametrize("layers", [(0, 2), (1, 2)], ids=["all layers", "the last layer"])
@pytest.mark.parametrize("target", [KINDS, ("ffn",)], ids=",".join)
def test_where_nothing_has_drifted_it_is_local(name, layers, target, tmp_path):
    found = {}
    for signal in ("local", "dense", "stream"):
        recipe, batches = setting(tmp_path, target_signal=signal, layers=layers, target=target)
        model = FAMILIES[name].build()
        report = liar_ext.prune(model, batches, recipe)
        adapter = adapter_for(model.config)
        weights = [
            adapter.sites_of(model, site.layer, (site.kind,))[0].weight() for site in report.sites
        ]
        found[signal] = (weights, [site.relative_residual for site in report.sites])
    (local, left), (dense, _), (stream, remains) = found.values()
    assert_close_rms(stream[0], local[0], 1e-5)
    assert remains[0] == pytest.approx(left[0], rel=1e-4)
    for ours, others in zip(stream[1:], zip(local[1:], dense[1:], strict=True), strict=True):
        assert not any(torch.allclose(ours, other, rtol=1e-3) for other in others)


def test_it_brings_the_outputs_closer_to_the_dense_ones(tmp_path):
    """On the calibration tokens, where the fit is."""
    errors = {}
    dense = FAMILIES["llama-gqa-biases"].build()
    for signal in ("local", "dense", "stream"):
        recipe, batches = setting(tmp_path, target_signal=signal, ridge=1e-4, sparsity=0.3)
        small = FAMILIES["llama-gqa-biases"].build()
        liar_ext.prune(small, batches, recipe)
        pairs = [(outputs(m, b.input_ids) for m in (small, dense)) for b in batches]
        errors[signal] = sum(float((one - other).square().sum()) for one, other in pairs)
    assert errors["stream"] < min(errors["dense"], errors["local"])


@pytest.mark.parametrize("name", ["llama-gqa-biases", "gpt2", "opt"])
@pytest.mark.parametrize("target", [KINDS, ("ffn",)], ids=",".join)
def test_the_place_of_hidden_states_does_not_show_in_the_result(
    name, target, tmp_path, monkeypatch
):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)  # tiny models have only small tensors
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path, target_signal="stream", target=target)
    trees = {}
    for place in ("device", "disk"):
        execution = Execution(hidden_states=place)
        liar_ext.compress(tmp_path / "dense", tmp_path / place, recipe, execution=execution)
        found = tree_hash(tmp_path / place)
        trees[place] = {path: one for path, one in found.items() if "report" not in path}
    assert trees["device"] == trees["disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "device", "disk", "t.npy"]


def test_nothing_is_left_on_the_shelf(tmp_path, monkeypatch):
    files: list[list[str]] = []
    real = Driver._keep

    def counting(self, *args):
        files.append(sorted(path.name for path in self.runtime.shelf._folder.iterdir()))
        assert not self._stream._outputs
        assert not self._stream._said
        real(self, *args)

    monkeypatch.setattr(Driver, "_keep", counting)
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, batches = setting(tmp_path, target_signal="stream")
    execution = Execution(hidden_states="disk")
    liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=execution)
    assert [len(names) for names in files] == [2 * len(batches), 0]


def test_bfloat16_follows_float32(tmp_path):
    recipe, batches = setting(tmp_path, target_signal="stream", criterion="magnitude")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = FAMILIES["llama-mha"].build().bfloat16().to(dtype)
        report = liar_ext.prune(model, batches, recipe)
        found[dtype] = [site.relative_residual for site in report.sites]
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.05)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "opt-post-norm"])
def test_a_post_norm_model_is_refused(name, tmp_path):
    family = FAMILIES[name]
    recipe, batches = setting(tmp_path, decoder=family.decoder, target_signal="stream")
    model = family.build()
    model.save_pretrained(tmp_path / "dense")
    says = r"--target-signal stream: .* \(post-norm\).*; choose from local, dense"
    for call in (
        lambda: liar_ext.prune(model, batches, recipe),
        lambda: planning.plan(tmp_path / "dense", recipe),
        lambda: liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "t.npy"]

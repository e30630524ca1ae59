"""What stands in for layers that are left out: the least squares of its definition, folded into the
consumer in front, on one path and on two, in memory and from file to file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from liar_depth import build
from liar_families import batches_of, outputs, tree_hash, write_tokens
from liar_testing import assert_close_rms
from safetensors.torch import load_file

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.cli import main
from liar_ext.depth.surgery import layer_list
from liar_ext.engine import compress
from liar_ext.engine.driver import Driver
from liar_ext.engine.execution import Execution
from liar_ext.models import adapter_for
from liar_ext.ops.drift import drift_reference
from liar_ext.report.schema import calibration_of

LAYERS, RIDGE = 6, 1e-3
PRE_NORM = ["llama", "llama-tied", "qwen3-windows", "gpt2", "opt", "granite", "gpt_neox"]
# float32 forwards and sums, solved in float64 at conditions up to 1/RIDGE
FIT = 2e-3


def recipe_of(tmp_path, **fields):
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy", samples=40)),
        "samples": 40,
        "seq_len": 24,
        "batch_size": 7,
        "ridge": RIDGE,
    }
    return Recipe(**{**base, **fields})


def last_consumer(model, layer):
    (*_, site) = adapter_for(model.config).sites_of(model, layer, ("heads", "ffn"))
    return site


@torch.no_grad()
def passing(model, batches, layer):
    """What enters a layer and leaves it, and what its last consumer is given; (T, ·) float64."""
    own, site = layer_list(model)[1][layer], last_consumer(model, layer)
    seen = {"enters": [], "leaves": [], "given": []}

    def before(module, args, kwargs):
        seen["enters"].append(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        seen["leaves"].append(output[0] if isinstance(output, tuple) else output)

    handles = [
        own.register_forward_pre_hook(before, with_kwargs=True),
        own.register_forward_hook(after),
        site.consumer.register_forward_pre_hook(lambda _, args: seen["given"].append(args[0])),
    ]
    for batch in batches:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
        for name, parts in seen.items()
    }


def solved(x, target, weight, center):
    """`W'` and `b' − b` that make `target` of x, pulled to W; by `drift_reference` as it is, for a
    dense path whose consumer would say `target`."""
    joint = torch.cat([x, target - x @ weight.T], 1)
    wide = torch.cat([weight, torch.eye(len(weight), dtype=x.dtype)], 1)
    own = torch.cat([x, torch.zeros_like(target)], 1)
    # columns of zeros carry the target; they are no regressors and count for no ridge
    scale = joint.shape[1] / x.shape[1]
    keep = torch.arange(x.shape[1])
    return drift_reference(joint, own, wide, keep, RIDGE * scale, center)


@pytest.mark.parametrize("signal", ["local", "dense", "stream"])
@pytest.mark.parametrize("name", PRE_NORM)
def test_one_gap_is_the_least_squares_fit_of_what_left_it(tmp_path, name, signal):
    """Up to the gap there is one path, so the three targets are one."""
    model = build(name)
    recipe = recipe_of(tmp_path, drop_layers=(3, 4), target_signal=signal)
    batches = batches_of(recipe, decoder=True)
    in_front, behind = passing(model, batches, 2), passing(model, batches, 4)
    site = last_consumer(model, 2)
    weight = site.weight().detach().double()
    bias = site.bias()
    # of what the layer adds, which multiplies what its consumers say
    scale = adapter_for(model.config).scale
    target = in_front["given"] @ weight.T + (behind["leaves"] - in_front["leaves"]) / scale
    expected, shift = solved(in_front["given"], target, weight, center=bias is not None)
    dense = copy.deepcopy(model)
    report = liar_ext.prune(model, batches, recipe)
    assert len(layer_list(model)[1]) == 4
    after = last_consumer(model, 2)
    assert_close_rms(after.weight() - weight, expected - weight, FIT)
    if bias is not None:
        assert_close_rms(after.bias() - bias, shift, FIT)
    # nothing else has changed
    for layer, source in enumerate((0, 1, 2, 5)):
        own = dict(layer_list(model)[1][layer].named_parameters())
        for path, parameter in layer_list(dense)[1][source].named_parameters():
            if layer != 2 or not path.startswith(after.spec.consumer):
                assert torch.equal(parameter, own[path])
    (only,) = report.sites
    assert (only.layer, only.units_after, only.across) == (2, only.units_before, [3, 4])
    assert report.layers["dropped"] == [3, 4]
    # what is left, by hand: the stream behind the gap
    found = passing(model, batches, 2)["leaves"]
    error = ((found - behind["leaves"]) / scale).square().sum()
    aimed = target + (0 if bias is None else bias.detach().double())
    total = (aimed - aimed.mean(0)).square().sum()
    assert only.relative_residual == pytest.approx(float(error / total), rel=1e-3)


@pytest.mark.parametrize("kinds", [("ffn",), ("heads",), ("ffn", "heads")])
def test_widths_and_layers_by_one_solve(tmp_path, kinds):
    """With a local target the fit aims at what the dense layer, and the gap behind it, make of the
    present states; dropped columns are part of the same fit."""
    model = build("llama")
    dense = copy.deepcopy(model)
    recipe = recipe_of(tmp_path, drop_layers=(3,), sparsity=0.5, target=kinds)
    batches = batches_of(recipe, decoder=True)
    report = liar_ext.prune(model, batches, recipe)
    # as the pruned model is in front of layer 2, and dense from there on
    standing = liar_ext.depth.surgery(dense, range(LAYERS), {})
    for layer in (0, 1):
        standing.model.layers[layer] = model.model.layers[layer]
    enters = passing(standing, batches, 2)
    behind = passing(standing, batches, 3)["leaves"]
    torch.testing.assert_close(enters["enters"], passing(model, batches, 2)["enters"])
    # the pruned attention of layer 2, and the dense FFN behind it: where the last Site stands
    with_heads = copy.deepcopy(standing)
    with_heads.model.layers[2].self_attn = model.model.layers[2].self_attn
    found = passing(with_heads, batches, 2)
    weight = dense.model.layers[2].mlp.down_proj.weight.detach().double()
    x = found["given"]
    target = behind - (found["leaves"] - x @ weight.T)
    gates = model.model.layers[2].mlp.gate_proj.weight
    rows = dense.model.layers[2].mlp.gate_proj.weight
    keep = torch.tensor([int((rows == own).all(1).nonzero()) for own in gates])
    assert len(keep) == (24 if "ffn" in kinds else 48)
    joint = torch.cat([x, target - x @ weight.T], 1)
    wide = torch.cat([weight, torch.eye(len(weight), dtype=x.dtype)], 1)
    own = torch.cat([x, torch.zeros_like(target)], 1)
    expected, _ = drift_reference(
        joint, own, wide, keep, RIDGE * joint.shape[1] / x.shape[1], center=False
    )
    new = model.model.layers[2].mlp.down_proj.weight.detach()
    assert_close_rms(new - weight[:, keep], expected - weight[:, keep], FIT)
    (gap,) = (site for site in report.sites if site.across)
    assert (gap.layer, gap.kind, gap.across) == (2, "ffn", [3])
    left = passing(model, batches, 2)["leaves"] - behind
    total = (target - target.mean(0)).square().sum()
    assert gap.relative_residual == pytest.approx(float(left.square().sum() / total), rel=1e-3)


@pytest.mark.parametrize("signal", ["local", "dense", "stream"])
def test_a_second_gap_aims_where_the_first_has_left_the_stream(tmp_path, signal):
    """`local`: at what left-out layers make of the present stream; `stream`: at the dense model's
    stream; `dense`: at the dense consumer's output and the dense gap."""
    model = build("llama")
    dense = copy.deepcopy(model)
    recipe = recipe_of(tmp_path, drop_layers=(1, 4), target_signal=signal)
    batches = batches_of(recipe, decoder=True)
    liar_ext.prune(model, batches, recipe)
    # layers 0, 2, 3, 5 of the source; the second gap is behind the third of them
    standing = copy.deepcopy(model)
    standing.model.layers[2] = dense.model.layers[3]
    present = passing(standing, batches, 2)
    weight = dense.model.layers[3].mlp.down_proj.weight.detach().double()
    x = present["given"]
    whole = passing(dense, batches, 3)
    gap = passing(dense, batches, 4)["leaves"] - whole["leaves"]
    if signal == "local":
        longer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**dense.config.to_dict(), "num_hidden_layers": 5})
        ).eval()
        longer.load_state_dict(dense.state_dict(), strict=False)
        for at, own in enumerate((*model.model.layers[:2], dense.model.layers[3])):
            longer.model.layers[at] = own
        longer.model.layers[3] = dense.model.layers[4]
        behind = passing(longer, batches, 3)["leaves"]
        target = x @ weight.T + behind - present["leaves"]
    elif signal == "dense":
        target = whole["given"] @ weight.T + gap
    else:
        target = passing(dense, batches, 4)["leaves"] - (present["leaves"] - x @ weight.T)
    expected, _ = solved(x, target, weight, center=False)
    new = model.model.layers[2].mlp.down_proj.weight.detach()
    assert_close_rms(new - weight, expected - weight, FIT)


COMPOSED = [
    {"depth": "streamline", "drop": 2},
    {"depth": "perplexity", "drop": 2, "sparsity": 0.5, "criterion": "obs"},
    {"depth": "shortgpt", "drop": 1, "sparsity": 0.3, "target_signal": "stream"},
    {"depth": "taylor", "drop": 2, "sparsity": 0.3, "allocation": "levels", "ridge": "auto"},
    {
        "depth": "reverse",
        "drop": 2,
        "span_repair": "none",
        "sparsity": 0.5,
        "statistics": "oneshot",
    },
    {"drop_layers": (2, 5), "sparsity": 0.5, "target": ("heads", "ffn"), "bias": "always"},
]


@pytest.mark.parametrize("fields", COMPOSED, ids=lambda f: f.get("depth", "listed"))
@pytest.mark.parametrize("name", ["llama", "qwen3-windows"])
def test_files_hold_what_is_made_in_memory(tmp_path, name, fields):
    model = build(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    before = tree_hash(tmp_path / "dense")
    recipe = recipe_of(tmp_path, search_samples=8, **fields)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    assert tree_hash(tmp_path / "dense") == before
    whole = sum(p.numel() for p in model.parameters())
    again = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    assert report.layers == again.layers
    assert [s.relative_residual for s in report.sites] == pytest.approx(
        [s.relative_residual for s in again.sites], rel=1e-3, abs=1e-6
    )
    loaded = liar_ext.load(tmp_path / "out")
    assert_close_rms(outputs(loaded), outputs(model), 1e-3)
    for totals in (report.totals, again.totals):
        assert totals["parameters_before"] == whole
        assert totals["parameters_after"] == sum(p.numel() for p in loaded.parameters())
    # and saved from memory
    liar_ext.save(model, tmp_path / "saved", again)
    assert torch.equal(outputs(liar_ext.load(tmp_path / "saved")), outputs(model))
    cached = loaded.generate(torch.tensor([[5, 9, 11]]), max_new_tokens=12, do_sample=False)
    plain = loaded.generate(
        torch.tensor([[5, 9, 11]]), max_new_tokens=12, do_sample=False, use_cache=False
    )
    assert torch.equal(cached, plain)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"of its {LAYERS} layers" in card
    assert main(["report", str(tmp_path / "out")]) == 0


def test_stock_transformers_loads_a_shorter_narrower_model(tmp_path):
    build("qwen3-windows").save_pretrained(tmp_path / "dense")
    recipe = recipe_of(tmp_path, depth="streamline", drop=2, sparsity=0.5)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), "nothing new, missing or left over"
    kept = [layer for layer in range(LAYERS) if layer not in report.layers["dropped"]]
    types = build("qwen3-windows").config.layer_types
    assert model.config.layer_types == [types[layer] for layer in kept]
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (4, 24)
    assert torch.equal(outputs(model), outputs(liar_ext.load(tmp_path / "out")))


def test_layers_by_their_place_need_no_text(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    recipe = Recipe(depth="magnitude-l2", drop=2, span_repair="none")
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = [layer for layer in range(LAYERS) if layer not in report.layers["dropped"]]
    for at, source in enumerate(kept):
        for name, value in model.model.layers[source].named_parameters():
            assert torch.equal(stored[f"model.layers.{at}.{name}"], value)
    assert report.calibration == {} and report.sites == []
    assert "nothing was repaired" in (tmp_path / "out" / "README.md").read_text()
    assert calibration_of(tmp_path / "out") is None
    with pytest.raises(InputError, match="--calibration is missing.*or --span-repair none"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "no", Recipe(depth="reverse", drop=1))
    assert not (tmp_path / "no").exists()


def test_a_post_norm_model_is_refused_by_name(tmp_path):
    model = build("bert")
    recipe = recipe_of(tmp_path, depth="shortgpt", drop=1)
    with pytest.raises(InputError, match=r"post-norm.*--span-repair none"):
        liar_ext.prune(model, batches_of(recipe, decoder=False), recipe)
    recipe = recipe_of(tmp_path, depth="shortgpt", drop=1, span_repair="none", sparsity=0.5)
    liar_ext.prune(model, batches_of(recipe, decoder=False), recipe)
    assert len(layer_list(model)[1]) == 5


def test_of_the_whole_model_only_the_left_out_layers_are_read_again(tmp_path, monkeypatch):
    """A layer that was read ahead for nothing would be in memory up to the next gap, or the end."""
    build("llama").save_pretrained(tmp_path / "dense")
    reads = {}
    read = CheckpointStore._read

    def noted(self, index):
        reads.setdefault(self, []).append(index)
        return read(self, index)

    monkeypatch.setattr(CheckpointStore, "_read", noted)
    recipe = recipe_of(tmp_path, drop_layers=(1, 2, 4))
    liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    whole, short = reads.values()
    assert sorted((whole, short), key=len) == [[0, 1, 2], [1, 2, 4]]


def test_a_failure_leaves_the_model_whole(tmp_path):
    """Layers are pruned in another tree over the same tensors."""
    model = build("llama")
    before = outputs(model)
    with torch.no_grad():
        model.model.layers[5].mlp.gate_proj.weight[0, 0] = float("nan")
    recipe = recipe_of(tmp_path, drop_layers=(2,), sparsity=0.5)
    with pytest.raises(InputError, match=r"layers\.4\.mlp\.gate_proj\.weight: has NaN"):
        liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    with torch.no_grad():
        model.model.layers[5].mlp.gate_proj.weight[0, 0] = (
            build("llama").model.layers[5].mlp.gate_proj.weight[0, 0]
        )
    assert torch.equal(outputs(model), before)


def test_a_choice_is_kept_before_the_first_layer_is_done(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "dense")
    fields = {"depth": "perplexity-greedy", "drop": 2, "sparsity": 0.3, "search_samples": 4}
    recipe = recipe_of(tmp_path, **fields)
    liar_ext.compress(tmp_path / "dense", tmp_path / "whole", recipe)
    shrink = Driver._shrink_layer

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Driver, "_shrink_layer", broken)
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        liar_ext.compress(
            tmp_path / "dense", tmp_path / "out", recipe, execution=Execution(journal_seconds=0)
        )
    monkeypatch.setattr(Driver, "_shrink_layer", shrink)
    monkeypatch.setattr(compress, "choose", broken)
    again = Execution(resume=True)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=again)
    assert report.run["resumed_at"] == 0
    # a layer is tried as often as before: none of them again
    assert len(report.layers["steps"]) == 2
    same = "model.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()


def test_the_command_line(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "dense")
    tokens = str(write_tokens(tmp_path / "t.npy", samples=40))
    out = tmp_path / "out"
    asked = ["prune", str(tmp_path / "dense"), "--out", str(out), "--calibration", tokens]
    asked += ["--seq-len", "24", "--drop", "2", "--depth"]
    assert main([*asked, "streamline", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["layers"]["after"] == 4
    assert len(report["layers"]["measured"]["influence"]) == 5
    assert main([*asked, "shortgpt", "--overwrite", "--sparsity", "0.5"]) == 0
    assert "layers" in capsys.readouterr().out
    assert main([*asked, "shortest", "--overwrite"]) == 2
    assert "--depth shortest: choose from" in capsys.readouterr().err
    listed = [*asked[:-3], "--drop-layers", "2-3", "--overwrite"]
    assert main(listed) == 0, "with a text to repair by"
    assert json.loads((out / "liar_report.json").read_text())["sites"][0]["across"] == [2, 3]


@pytest.mark.parametrize("signal", ["dense", "stream"])
def test_what_keeps_its_columns_makes_up_for_the_rest(tmp_path, signal):
    """`--refit all`: attention behind a gap, which loses nothing, is fitted to the dense path."""
    model = build("llama")
    dense = copy.deepcopy(model)
    recipe = recipe_of(tmp_path, drop_layers=(2,), target_signal=signal, refit="all")
    batches = batches_of(recipe, decoder=True)
    report = liar_ext.prune(model, batches, recipe)
    fitted = [(site.layer, site.kind) for site in report.sites]
    # in front of the gap there is nothing to make up for
    assert fitted == [(1, "ffn"), *((at, kind) for at in (2, 3, 4) for kind in ("heads", "ffn"))]
    assert all(site.units_after == site.units_before for site in report.sites)
    # the third layer of the result is the fourth of the source; dense from there on
    standing = copy.deepcopy(model)
    standing.model.layers[2] = dense.model.layers[3]
    inputs = {}
    for name, own, at in (("present", standing, 2), ("dense", dense, 3)):
        seen = []
        consumer = own.model.layers[at].self_attn.o_proj
        handle = consumer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        inputs[name] = passing(own, batches, at)["enters"]
        handle.remove()
        inputs[f"{name} x"] = torch.cat([part.flatten(0, 1) for part in seen]).double()
    weight = dense.model.layers[3].self_attn.o_proj.weight.detach().double()
    target = inputs["dense x"] @ weight.T
    if signal == "stream":
        target = target + inputs["dense"] - inputs["present"]
    expected, _ = solved(inputs["present x"], target, weight, center=False)
    new = model.model.layers[2].self_attn.o_proj.weight.detach()
    assert_close_rms(new - weight, expected - weight, FIT)


def test_refit_with_widths_alone(tmp_path):
    """Heads behind the first pruned FFN are fitted too; those in front are not."""
    model = build("llama")
    fields = {"sparsity": 0.5, "layers": (2, 4), "target_signal": "stream", "refit": "all"}
    recipe = recipe_of(tmp_path, **fields)
    report = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    assert [(site.layer, site.kind) for site in report.sites] == [
        (2, "ffn"),
        *((at, kind) for at in (3, 4, 5) for kind in ("heads", "ffn")),
    ]
    narrow = [site.layer for site in report.sites if site.units_after < site.units_before]
    assert narrow == [2, 3]
    totals = report.totals
    assert totals["site_parameters_after"] == totals["site_parameters_before"] / 2
    with pytest.raises(InputError, match="--refit all with --target-signal local"):
        Recipe(refit="all")

"""Sites that lose all their units: in memory and on disk, what is repaired, resumed and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from liar_families import batches_of, randomise, write_tokens

import liar_ext
from liar_ext import InputError, Recipe, planning
from liar_ext.allocation import Allocation
from liar_ext.engine.compression import check_possible
from liar_ext.engine.driver import Driver
from liar_ext.engine.execution import Execution
from liar_ext.engine.store import InMemory
from liar_ext.models import layout
from liar_ext.models.absent import Absent
from liar_ext.planning import plan

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
RATES = {"solve": 1e9, "residual": 1e9}
# kept units by layer, FFN and heads as the Sites come: heads first
WIDTHS = [(4, 48), (0, 24), (3, 0), (0, 0)]


def _dense(**changes: Any) -> transformers.PreTrainedModel:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, **changes))
    model.config.architectures = ["LlamaForCausalLM"]
    return randomise(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _dense().save_pretrained(tmp_path / "dense")
    write_tokens(tmp_path / "tokens.npy")
    return tmp_path


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths that the tests are about, whatever the allocation would say."""
    every = [units for layer in WIDTHS for units in layer]
    monkeypatch.setattr(Allocation, "widths", lambda *args, **kwargs: every)


def _recipe(folder: Path, **changes: Any) -> Recipe:
    values = {"calibration": str(folder / "tokens.npy"), "seq_len": 24, "samples": 24}
    values |= {"sparsity": 0.5, "target": ("ffn", "heads"), "allocation": "global", "empty": True}
    return Recipe(**{**values, "batch_size": 8, **changes})


CASES = [
    {},
    {"bias": "always"},
    {"reconstruct": "none"},
    {"reconstruct": "none", "bias": "always"},
    {"reconstruct": "bias"},
    {"reconstruct": "mask-tuning"},
    {"ridge": "auto"},
    {"statistics": "oneshot"},
    {"target_signal": "dense"},
    {"target_signal": "stream", "bias": "always", "refit": "all"},
]


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_from_disk_is_what_it_is_in_memory(folder: Path, changes: dict[str, Any]) -> None:
    recipe = _recipe(folder, **changes)
    report = liar_ext.compress(folder / "dense", folder / "out", recipe)
    loaded = liar_ext.load(folder / "out")
    assert [tuple(own[k] for k in ("heads", "ffn")) for own in layout.read(loaded)] == WIDTHS
    assert isinstance(loaded.model.layers[1].self_attn, Absent)
    assert report.layout == "liar_ext"
    model = _dense()
    batches = batches_of(recipe, decoder=True)
    liar_ext.prune(model, batches, recipe)
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        now, wanted = loaded(tokens).logits, model(tokens).logits
    assert float((now - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    for each in (loaded, model):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        cached = each.generate(tokens, use_cache=True, **options)
        assert torch.equal(cached, each.generate(tokens, use_cache=False, **options))


@pytest.mark.usefixtures("fixed")
def test_a_bias_says_the_mean_of_what_is_gone(folder: Path) -> None:
    """Of the first layer that loses its attention, on the calibration tokens themselves."""
    recipe = _recipe(folder, bias="always", statistics="oneshot")
    liar_ext.compress(folder / "dense", folder / "out", recipe)
    bias = liar_ext.load(folder / "out").model.layers[1].self_attn.o_proj.bias
    heard: list[torch.Tensor] = []
    dense = _dense()
    dense.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: heard.append(output.double().flatten(0, 1))
    )
    batches = batches_of(recipe, decoder=True)
    with torch.no_grad():
        for batch in batches:
            dense(batch.input_ids)
    mean = torch.cat(heard).mean(0)
    assert float((bias.detach().double() - mean).abs().max()) <= 1e-5 * float(mean.abs().max())


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize(("signal", "exact"), [("stream", True), ("dense", True), ("local", False)])
def test_the_bias_of_what_is_gone_makes_up_for_the_drift(
    folder: Path, signal: str, exact: bool
) -> None:
    """Behind an FFN that has gone the stream has the dense one's mean, whatever drifted before."""
    recipe = _recipe(folder, bias="always", target_signal=signal)
    liar_ext.compress(folder / "dense", folder / "out", recipe)
    means = []
    for model in (_dense(), liar_ext.load(folder / "out")):
        left: list[torch.Tensor] = []
        model.model.layers[2].register_forward_hook(
            lambda module, args, output, left=left: left.append(output.double().flatten(0, 1))
        )
        with torch.no_grad():
            for batch in batches_of(recipe, decoder=True):
                model(batch.input_ids)
        means.append(torch.cat(left).mean(0))
    off = float((means[1] - means[0]).abs().max() / means[0].abs().max())
    assert (off <= 1e-5) is exact


def test_allocations_leave_parts_out(folder: Path) -> None:
    """With nearly nothing left, single units cannot be what is best everywhere."""
    for allocation in ("global", "levels", "segments"):
        recipe = _recipe(folder, allocation=allocation, sparsity=0.9, search_evaluations=40)
        report = liar_ext.compress(folder / "dense", folder / allocation, recipe, overwrite=True)
        assert any(site.units_after == 0 for site in report.sites), allocation
        assert report.totals["sparsity"] == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.usefixtures("fixed")
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    folder: Path, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(folder, bias="always")
    liar_ext.compress(folder / "dense", folder / "whole", recipe)
    shrink = Driver._shrink_layer

    def broken(self: Driver, index: int, position: Any) -> None:
        if index == layer:
            raise KeyboardInterrupt
        shrink(self, index, position)

    monkeypatch.setattr(Driver, "_shrink_layer", broken)
    often = Execution(journal_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        liar_ext.compress(folder / "dense", folder / "out", recipe, execution=often)
    monkeypatch.setattr(Driver, "_shrink_layer", shrink)
    again = Execution(resume=True)
    report = liar_ext.compress(folder / "dense", folder / "out", recipe, execution=again)
    assert report.run["resumed_at"] == layer
    same = "model.safetensors"
    assert (folder / "out" / same).read_bytes() == (folder / "whole" / same).read_bytes()


@pytest.mark.parametrize(
    ("config", "target", "said"),
    [
        (
            transformers.BertConfig,
            ("ffn",),
            r"ffn of this bert model is no .* \(it has norms .* \(post-norm\)\); leave --empty out",
        ),
        (
            transformers.OPTConfig,
            ("ffn",),
            "ffn of this opt model is no module .*; leave it out",
        ),
    ],
)
def test_refuses_families_whose_parts_cannot_go(
    folder: Path, config: Any, target: tuple[str, ...], said: str
) -> None:
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "word_embed_proj_dim": 32, "ffn_dim": 48}
    made = transformers.AutoModel.from_config(config(**small, intermediate_size=48))
    made.save_pretrained(folder / "other")
    with pytest.raises(InputError, match=said):
        liar_ext.compress(folder / "other", folder / "out", _recipe(folder, target=target))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("allocation", ["segments", "spdy"])
def test_a_site_of_one_unit_is_searched(folder: Path, allocation: str) -> None:
    """Its only other level is none: there is nothing for a criterion to choose."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**CONFIG | {"num_key_value_heads": 1})
    )
    randomise(model).save_pretrained(folder / "one")
    recipe = _recipe(folder, allocation=allocation, target=("heads",), search_evaluations=20)
    liar_ext.compress(folder / "one", folder / "out", recipe)
    kept = [own["heads"] for own in layout.read(liar_ext.load(folder / "out"))]
    assert sorted(kept) == [0, 0, 1, 1]


@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
def test_parts_of_gpt2_go(folder: Path, statistics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linears cannot be called without columns, and a forward stands in front of one."""
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    dense = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    dense.save_pretrained(folder / "gpt2")
    every = [4, 128, 0, 40, 3, 0, 0, 0]
    monkeypatch.setattr(Allocation, "widths", lambda *args, **kwargs: every)
    recipe = _recipe(folder, statistics=statistics)
    liar_ext.compress(folder / "gpt2", folder / "out", recipe)
    loaded = liar_ext.load(folder / "out")
    assert [own[k] for own in layout.read(loaded) for k in ("heads", "ffn")] == every
    liar_ext.prune(dense, batches_of(recipe, decoder=True), recipe)
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        now, wanted = loaded(tokens).logits, dense(tokens).logits
    assert float((now - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("types", [None, ["sliding_attention", "full_attention"] * 2])
def test_attention_that_counts_tokens_stays(folder: Path, types: list[str] | None) -> None:
    """Or a whole search ends with a model that cannot be."""
    options = {"layer_types": types, "use_sliding_window": True, "sliding_window": 8}
    config = transformers.Qwen3Config(**CONFIG, head_dim=12, **(options if types else {}))
    randomise(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder / "qwen3")
    changes = {"target": ("heads",), "search_evaluations": 30}
    for allocation in ("segments", "levels", "global"):
        recipe = _recipe(folder, allocation=allocation, sparsity=0.9, **changes)
        liar_ext.compress(folder / "qwen3", folder / "out", recipe, overwrite=True)
        kept = [own["heads"] for own in layout.read(liar_ext.load(folder / "out"))]
        assert kept[0] >= 1, allocation
        assert 0 in kept, allocation
    recipe = _recipe(folder, sparsity=0.95, **changes)
    with pytest.raises(InputError, match="the first layer keeps .* at most 0.9375"):
        liar_ext.compress(folder / "qwen3", folder / "out", recipe, overwrite=True)
    # where another layer is not pruned, all of the targeted ones may go
    recipe = _recipe(folder, sparsity=0.95, layers=(0, 2), **changes)
    if types is None:
        liar_ext.compress(folder / "qwen3", folder / "out", recipe, overwrite=True)
        kept = [own["heads"] for own in layout.read(liar_ext.load(folder / "out"))]
        assert kept == [0, 0, 4, 4]


def test_refuses_equal_widths() -> None:
    with pytest.raises(InputError, match="--empty with --allocation uniform"):
        Recipe(empty=True)


@pytest.mark.usefixtures("fixed")
def test_the_config_says_what_is_there(folder: Path) -> None:
    liar_ext.compress(folder / "dense", folder / "out", _recipe(folder))
    data = json.loads((folder / "out" / "config.json").read_text())
    assert data["model_type"] == "liar_ext"
    assert [own["heads"] for own in data["liar_ext"]["layers"]] == [w[0] for w in WIDTHS]
    card = (folder / "out" / "README.md").read_text()
    assert "no attention in 1, 3; no FFN in 2-3 (layers, counted from 0)" in card


def test_the_heads_that_tokens_are_counted_by_stay(folder: Path) -> None:
    """Whatever goes, a model comes out: of four layers the first keeps a KV group."""
    recipe = _recipe(folder, allocation="segments", sparsity=0.97, search_evaluations=40)
    report = liar_ext.compress(folder / "dense", folder / "out", recipe)
    first = next(site for site in report.sites if (site.layer, site.kind) == (0, "heads"))
    assert first.units_after >= 1
    liar_ext.load(folder / "out")
    with pytest.raises(InputError, match="at most 0.9"):
        liar_ext.compress(folder / "dense", folder / "more", replace(recipe, sparsity=0.999))


def test_a_table_that_is_thinned_out_is_said_in_the_report(folder: Path) -> None:
    recipe = _recipe(folder, allocation="segments", search_evaluations=5)
    report = liar_ext.compress(folder / "dense", folder / "out", recipe)
    (said,) = [text for text in report.warnings if "levels of each Site" in text]
    assert said in planning.plan(folder / "dense", recipe)["notes"]


@pytest.mark.parametrize("allocation", ["global", "ranked", "kwon", "influence", "levels"])
def test_units_of_emptied_sites_go_before_better_ones_elsewhere(
    folder: Path, allocation: str
) -> None:
    """Where one layer's FFN counts for nothing, no allocation that sees that keeps a neuron."""
    model = _dense()
    model.model.layers[2].mlp.down_proj.weight.data *= 1e-6
    model.save_pretrained(folder / "silent")
    recipe = _recipe(folder, allocation=allocation, target=("ffn",), sparsity=0.5)
    report = liar_ext.compress(folder / "silent", folder / "out", recipe)
    kept = {site.layer: site.units_after for site in report.sites}
    if allocation in ("ranked", "kwon", "influence"):
        # global and levels compare within each Site only
        assert kept[2] == min(kept.values())
    if allocation in ("ranked", "kwon"):
        assert kept[2] == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.96])
@pytest.mark.parametrize("allocation", ["global", "levels", "segments"])
def test_a_plan_is_of_what_is_made(folder: Path, allocation: str, sparsity: float) -> None:
    recipe = _recipe(folder, allocation=allocation, sparsity=sparsity, search_evaluations=40)
    found = plan(folder / "dense", recipe, rates=dict.fromkeys(("forward", "gram"), 1e9) | RATES)
    assert found["parameters"]["after"] < found["parameters"]["before"]


def test_a_plan_refuses_what_a_search_cannot_do(folder: Path) -> None:
    recipe = _recipe(folder, allocation="segments", search_evaluations=2)
    for call in (plan, liar_ext.compress):
        where = (folder / "dense",) if call is plan else (folder / "dense", folder / "out")
        with pytest.raises(InputError, match="give .* or more"):
            call(*where, recipe)  # type: ignore[operator]


def test_a_grid_refuses_it_as_well(folder: Path) -> None:
    recipe = _recipe(folder, allocation="segments", search_evaluations=2)
    batches = batches_of(recipe, decoder=True)
    tokens = sum(batch.tokens for batch in batches)
    with pytest.raises(InputError, match="give .* or more"):
        check_possible(InMemory(_dense()), recipe, batches, tokens)
    check_possible(InMemory(_dense()), replace(recipe, search_evaluations=40), batches, tokens)

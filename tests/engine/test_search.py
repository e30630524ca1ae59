"""Searches end to end: levels, candidates, widths, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from liar_families import FAMILIES, LAYERS, batches_of, randomise, write_tokens
from transformers import BertForMaskedLM, LlamaForCausalLM

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.checkpoint.store import CheckpointStore
from liar_ext.costs import Tokens, layer_flops
from liar_ext.engine.budgets import budgets
from liar_ext.engine.execution import Execution
from liar_ext.engine.level_store import FiledLevels
from liar_ext.engine.oracle import ModelOracle
from liar_ext.engine.progress import Silent
from liar_ext.engine.search import LEVELS, level_bytes, level_grid
from liar_ext.engine.store import InMemory
from liar_ext.models import adapter_for
from liar_ext.ops.removal import removal_flops
from liar_ext.planning import plan
from liar_ext.report.text import size
from liar_ext.search_costs import search_sizes

SEARCHES = [name for name, allocation in ALLOCATIONS.items() if allocation.search is not None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    write_tokens(root / "tokens.npy")
    for name in ("llama-gqa-biases", "bert"):
        FAMILIES[name].build().save_pretrained(root / name)
    return root


def tree_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def recipe_of(bench, **changes):
    values = {"calibration": str(bench / "tokens.npy"), "seq_len": 24, "samples": 24}
    values |= {"sparsity": 0.5, "target": ("ffn", "heads"), "allocation": "spdy"}
    return Recipe(**{**values, "search_samples": 6, "search_evaluations": 12, **changes})


@pytest.mark.parametrize("name", ["llama-gqa-biases", "bert"])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_best_that_was_tried_is_near_what_is_made(bench, tmp_path, name, search):
    recipe = recipe_of(bench, allocation=search, batch_size=4)
    report = liar_ext.compress(bench / name, tmp_path / "out", recipe)
    lines = (tmp_path / "out" / "liar_search.jsonl").read_text().splitlines()
    tried = [json.loads(line) for line in lines]
    facts = report.run["search"]
    assert facts["tried"] == len({tuple(entry["units"]) for entry in tried}) <= 12 * 64
    whole = [entry for entry in tried if entry["windows"] == 6]
    assert facts["tried_on_all_windows"] == len(whole) <= 12
    best = min(whole, key=lambda entry: entry["loss"])
    assert (facts["best_loss"], facts["best"]) == (best["loss"], best["units"])
    assert facts["first_loss"] == whole[0]["loss"]
    # the budget takes what is left of it from there, at most a level of a Site away
    made = [site.units_after for site in report.sites]
    for site, after, found in zip(report.sites, made, best["units"], strict=True):
        assert abs(after - found) <= -(-site.units_before // 4)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.05)
    loaded = liar_ext.load(tmp_path / "out")
    sites = [
        site.units
        for index in range(LAYERS)
        for site in adapter_for(loaded.config).sites_of(loaded, index, ("ffn", "heads"))
    ]
    assert sorted(sites) == sorted(made)


def test_in_memory_and_streamed_find_the_same(bench, tmp_path):
    recipe = recipe_of(bench)
    streamed = liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "out", recipe)
    model = FAMILIES["llama-gqa-biases"].build()
    held = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    assert held.run["search"] == streamed.run["search"]
    assert [s.units_after for s in held.sites] == [s.units_after for s in streamed.sites]


@pytest.mark.parametrize(
    ("units", "kind", "round_to", "expected"),
    [
        (4, "heads", 1, (1, 2, 3, 4)),
        (1, "ffn", 1, (1,)),
        (48, "ffn", 1, (1, *range(4, 49, 4))),
        (48, "ffn", 16, (16, 32, 48)),
        (5, "ffn", 16, (5,)),
        (30, "heads", 16, (1, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 30)),
    ],
)
def test_levels_of_a_site(units, kind, round_to, expected):
    found = level_grid(Budget(kind, units, 1), round_to)
    assert found == expected
    assert len(found) <= LEVELS + 1


def test_widths_are_multiples_where_they_should_be(bench, tmp_path):
    recipe = recipe_of(bench, round_to=8, target=("ffn",))
    report = liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "out", recipe)
    lines = (tmp_path / "out" / "liar_search.jsonl").read_text().splitlines()
    tried = {units for line in lines for units in json.loads(line)["units"]}
    assert all(units % 8 == 0 for units in tried)
    assert all(site.units_after % 8 == 0 for site in report.sites)


def test_without_room_for_levels_nothing_is_begun(bench, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10, 10))
    # neither gradients nor the survey
    recipe = recipe_of(bench, criterion="fisher")
    monkeypatch.setattr(CheckpointStore, "open", lambda *given: pytest.fail("a layer was read"))
    with pytest.raises(InputError, match=r"levels of a search take .* KiB in .*larger disk"):
        liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "out", recipe)
    assert list(tmp_path.iterdir()) == []


def test_without_memory_for_levels_nothing_is_begun(bench, monkeypatch):
    monkeypatch.setattr("liar_ext.engine.level_store.free_bytes", lambda device: 1000)
    recipe = recipe_of(bench)
    model = FAMILIES["bert"].build()
    before = tree_of(model)
    with pytest.raises(InputError, match=r"KiB in memory, and 1000 B are free; .*liar prune"):
        liar_ext.prune(model, batches_of(recipe, decoder=False), recipe)
    assert tree_of(model) == before


def test_levels_are_gone_before_the_output_is_made(bench, tmp_path, monkeypatch):
    there = []
    prepare = CheckpointStore.prepare

    def looking(self, *given):
        there.append([path.name for path in (tmp_path / ".out.job").iterdir()])
        prepare(self, *given)

    monkeypatch.setattr(CheckpointStore, "prepare", looking)
    liar_ext.compress(bench / "bert", tmp_path / "out", recipe_of(bench))
    (names,) = there
    assert "levels" not in names and "search.safetensors" in names


def test_what_happens_is_told(bench, tmp_path):
    class Told(Silent):
        def __init__(self):
            self.lines, self.passes, self.steps = [], [], 0

        def begin(self, layers, label, done=0):
            self.passes.append((label, layers, done))
            self.steps = 0

        def layer(self, index):
            self.steps += 1
            label, layers, _ = self.passes[-1]
            if label.startswith("searching"):
                assert self.steps <= layers

        def tell(self, message):
            self.lines.append(message)

    told = Told()
    recipe = recipe_of(bench, allocation="level-swaps", search_evaluations=20, search_samples=8)
    report = liar_ext.compress(bench / "bert", tmp_path / "out", recipe, progress=told)
    labels = [label for label, _, _ in told.passes]
    assert labels == ["measuring levels", "making levels", "searching (level-swaps)", "pruning"]
    first, *better = told.lines
    facts = report.run["search"]
    assert f"levels take {size(facts['levels_bytes'])} in " in first
    losses = [float(line.rpartition(" ")[2]) for line in better]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(facts["best_loss"], rel=1e-4)
    assert losses[0] <= facts["first_loss"] * (1 + 1e-4)


def test_no_finite_loss_at_all_is_refused(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "liar_ext.engine.oracle.divergence", lambda *given: torch.tensor(float("nan"))
    )
    with pytest.raises(InputError, match=r"--allocation spdy: none of the \d+ models .*--dtype"):
        liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "out", recipe_of(bench))


# a table of single changes is more than one model
@pytest.mark.parametrize("search", [name for name in SEARCHES if name != "segments"])
def test_few_evaluations_are_enough(bench, tmp_path, search):
    recipe = recipe_of(bench, allocation=search, search_evaluations=1, search_samples=1)
    report = liar_ext.compress(bench / "bert", tmp_path / "out", recipe)
    assert report.run["search"]["tried"] == 1


@pytest.mark.parametrize("criterion", ["random", "obs", "obs-swap", "wanda"])
def test_levels_are_what_the_criterion_and_the_repair_make_of_the_dense_site(
    bench, tmp_path, monkeypatch, criterion
):
    """Each level of the last layer, by an independent fit on inputs of the dense model."""
    kept = {}
    monkeypatch.setattr(FiledLevels, "discard", lambda self: None)
    save = FiledLevels.save

    def saving(self, key, units, level):
        kept[key, units] = level
        save(self, key, units, level)

    monkeypatch.setattr(FiledLevels, "save", saving)
    recipe = recipe_of(bench, criterion=criterion, search_evaluations=1, ridge=0.0)
    liar_ext.compress(bench / "bert", tmp_path / "out", recipe)
    model = FAMILIES["bert"].build()
    (site,) = adapter_for(model.config).sites_of(model, LAYERS - 1, ("ffn",))
    inputs = []
    site.consumer.register_forward_hook(lambda module, x, y: inputs.append(x[0]))
    with torch.no_grad():
        for batch in batches_of(recipe, decoder=False):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
            inputs[-1] = inputs[-1][batch.attention_mask]
    x = torch.cat(inputs).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    target = x[:, :-1] @ site.weight().double().T + site.bias().double()
    own = {units: level for (key, units), level in kept.items() if key == (LAYERS - 1, "ffn")}
    assert list(own) == sorted(own, reverse=True) and len(own) == LEVELS
    before = set(range(site.units))
    for units, level in own.items():
        assert level.keep.tolist() == sorted(set(level.keep.tolist())) and len(level.keep) == units
        if criterion != "obs-swap":
            assert set(level.keep.tolist()) <= before, "one goes on from the other"
        before = set(level.keep.tolist())
        fit = torch.linalg.lstsq(x[:, [*level.keep.tolist(), -1]], target).solution
        assert torch.allclose(level.weight.double(), fit[:-1].T, rtol=1e-3, atol=1e-3)
        assert torch.allclose(level.bias.double(), fit[-1], rtol=1e-3, atol=1e-3)


def test_the_plan_counts_the_levels_on_disk(bench, tmp_path):
    found = plan(bench / "llama-gqa-biases", recipe_of(bench), out=tmp_path / "out")
    model = FAMILIES["llama-gqa-biases"].build()
    expected = 0
    for index in range(LAYERS):
        for site in adapter_for(model.config).sites_of(model, index, ("ffn", "heads")):
            widths = level_grid(Budget(site.kind, site.units, 1), 1)[:-1]
            outputs = site.weight().shape[0]
            # float32 weights and a bias, int64 units
            expected += sum(
                8 * units + 4 * outputs * (units * site.columns_per_unit + 1) for units in widths
            )
            assert level_bytes(site, (*widths, site.units)) <= expected
    disk = found["disk"]
    assert disk["levels"] == expected
    # levels are gone when the output is made
    after = disk["output"] + disk["snapshots"]
    assert disk["total"] == max(expected, after) + disk.get("scratch", 0)
    # the dense model, uniform and the solution of levels, and two stages of 5
    assert any("reads the layers about 4 times" in note for note in found["notes"])
    assert found["flops"]["search"] > 0 and found["exact"] is False
    assert any("tried whole models" in note for note in found["notes"])
    names = [phase["name"] for phase in found["phases"]["all"]]
    assert "comparing candidates" in names and "level of ffn" in names
    plain = plan(bench / "llama-gqa-biases", recipe_of(bench, allocation="uniform"))
    assert "levels" not in plain["disk"] and plain["flops"]["search"] == 0
    assert plain["flops"]["solve"] < found["flops"]["solve"]


@pytest.mark.parametrize("target", [("ffn",), ("heads",)], ids=str)
def test_the_plan_of_a_search_counts_what_candidates_run(target):
    """Half of the targeted Sites of the layers, and no head where hidden states are compared."""
    config = FAMILIES["bert"].build().config
    adapter = adapter_for(config)
    recipe = Recipe(sparsity=0.5, target=target, allocation="evolution", search_evaluations=10)
    recipe = replace(recipe, search_samples=4)
    with torch.device("meta"):
        models = [BertForMaskedLM(config) for _ in range(2)]
    whole, smaller = models
    tokens = Tokens(480, 480, 20, 24, 96, 1, True)
    known = budgets(InMemory(whole), recipe, tokens.seq_len)
    found = search_sizes(whole, adapter, recipe, tokens, known, False, 1)
    for index in range(LAYERS):
        for site in adapter.sites_of(smaller, index, target):
            site.shrink(torch.arange(site.units // 2))
    before, after = (sum(layer_flops(model, adapter, tokens.seq_len)) for model in models)
    assert found.flops["search"] == 4 * 24 * (before + 10 * after)
    assert after < before


@pytest.mark.parametrize("search", SEARCHES)
def test_the_plan_knows_how_often_layers_are_read(bench, monkeypatch, search):
    recipe = recipe_of(bench, allocation=search, search_evaluations=20)
    reads = []
    assembled, stream = ModelOracle._assembled, ModelOracle._stream

    def counted(self, candidates, windows):
        reads.append("candidates")
        return assembled(self, candidates, windows)

    def streamed(self, windows):
        reads.extend(["dense"] * (windows not in self._streams))
        return stream(self, windows)

    monkeypatch.setattr(ModelOracle, "_assembled", counted)
    monkeypatch.setattr(ModelOracle, "_stream", streamed)
    model = FAMILIES["llama-gqa-biases"].build()
    tokens = Tokens(576, 576, 24, 24, 192, 1, True)
    adapter, known = adapter_for(model.config), budgets(InMemory(model), recipe, 24)
    sizes = search_sizes(model, adapter, recipe, tokens, known, False, 1)
    liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    # with 4 Sites a few candidates come twice, and their places are taken later
    assert abs(sizes.passes - len(reads)) <= 1


def test_the_plan_of_a_greedy_criterion_has_one_removal_for_all_levels(bench):
    solves = {
        name: plan(bench / "llama-gqa-biases", recipe_of(bench, criterion=name))["flops"]["solve"]
        for name in ("wanda", "obs")
    }
    model = FAMILIES["llama-gqa-biases"].build()
    sites = [
        site
        for index in range(LAYERS)
        for site in adapter_for(model.config).sites_of(model, index, ("ffn", "heads"))
    ]
    # the levels' and, of about half the columns, the last one
    removals = sum(
        removal_flops(n, len(site.weight()), n - site.columns_per_unit)
        + removal_flops(n, len(site.weight()), n // 2)
        for site in sites
        for n in [site.columns]
    )
    assert solves["obs"] - solves["wanda"] == pytest.approx(removals, rel=0.05)


def test_a_site_of_a_single_unit_has_no_levels(tmp_path):
    config = FAMILIES["llama-mha"].build().config
    config.num_key_value_heads = 1
    model = randomise(LlamaForCausalLM(config))
    recipe = Recipe(sparsity=0.3, target=("heads", "ffn"), allocation="evolution", seq_len=24)
    recipe = replace(
        recipe, search_evaluations=4, calibration=str(write_tokens(tmp_path / "t.npy"))
    )
    model.save_pretrained(tmp_path / "dense")
    found = plan(tmp_path / "dense", recipe)
    assert found["disk"]["levels"] > 0
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    assert {site.units_after for site in report.sites if site.kind == "heads"} == {1}


def test_more_samples_than_there_are_is_all_of_them(bench, tmp_path):
    report = liar_ext.compress(
        bench / "bert", tmp_path / "out", recipe_of(bench, search_samples=1000)
    )
    assert report.run["search"]["windows"] == 24


@pytest.mark.parametrize("field", ["search_samples", "search_evaluations"])
def test_numbers_that_are_none(bench, field):
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} 0: must be a whole"):
        recipe_of(bench, **{field: 0})


def test_a_search_is_the_same_again(bench, tmp_path):
    files = []
    for name in ("one", "other"):
        torch.manual_seed(len(files))
        liar_ext.compress(
            bench / "bert", tmp_path / name, recipe_of(bench, allocation="level-swaps", seed=7)
        )
        files.append((tmp_path / name / "liar_search.jsonl").read_bytes())
    assert files[0] == files[1]


def test_levels_whose_ridge_was_raised_are_counted(bench, tmp_path, monkeypatch):
    """With twins of neurons and no ridge; an interrupted run counts those that it had made."""
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
                module.weight[24:] = module.weight[:24]
    model.save_pretrained(tmp_path / "dense")
    changes = {"target": ("ffn",), "criterion": "obs", "search_evaluations": 2}
    recipe = recipe_of(bench, allocation="evolution", search_samples=1, **changes)
    plain = liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "plain", recipe).run["search"]
    assert (plain["levels_noted"], "first_note" in plain) == (0, False)

    recipe = replace(recipe, ridge=0.0)
    facts = liar_ext.compress(tmp_path / "dense", tmp_path / "whole", recipe).run["search"]
    # the selection of each Site had to raise it
    assert facts["levels_noted"] == facts["levels"] == 24
    assert facts["first_note"].startswith(
        "model.layers.0.mlp.down_proj at 1 of 48 units: selection"
    )
    in_memory = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe).run["search"]
    assert in_memory == facts
    save, saved = FiledLevels.save, []

    def saving(self, key, units, level):
        if len(saved) == 15:
            raise KeyboardInterrupt
        saved.append(units)
        save(self, key, units, level)

    monkeypatch.setattr(FiledLevels, "save", saving)
    with pytest.raises(KeyboardInterrupt):
        liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    monkeypatch.setattr(FiledLevels, "save", save)
    again = Execution(resume=True)
    resumed = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=again)
    assert resumed.run["search"] == facts

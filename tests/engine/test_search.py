"""Searches end to end: levels, candidates, widths, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from liar_families import FAMILIES, LAYERS, batches_of, write_tokens

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.engine.search import LEVELS, level_bytes, level_grid
from liar_ext.models import adapter_for
from liar_ext.planning import plan

SEARCHES = [name for name, allocation in ALLOCATIONS.items() if allocation.search is not None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    write_tokens(root / "tokens.npy")
    for name in ("llama-gqa-biases", "bert"):
        FAMILIES[name].build().save_pretrained(root / name)
    return root


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
    assert facts["tried"] == len(tried) <= 12 * 64
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
    with pytest.raises(InputError, match=r"levels of a search take .* GB .*larger disk"):
        liar_ext.compress(bench / "llama-gqa-biases", tmp_path / "out", recipe_of(bench))
    assert list(tmp_path.iterdir()) == []


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
    assert found["disk"]["levels"] == expected
    assert found["flops"]["search"] > 0 and found["exact"] is False
    assert any("tried whole models" in note for note in found["notes"])
    names = [phase["name"] for phase in found["phases"]["all"]]
    assert "comparing candidates" in names and "level of ffn" in names
    plain = plan(bench / "llama-gqa-biases", recipe_of(bench, allocation="uniform"))
    assert "levels" not in plain["disk"] and plain["flops"]["search"] == 0
    assert plain["flops"]["solve"] < found["flops"]["solve"]


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

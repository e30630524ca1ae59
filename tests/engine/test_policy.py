"""The policy pass: masked models against models whose columns are zero, and whole compressions."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from liar_families import (
    FAMILIES,
    LENGTH,
    batches_of,
    outputs,
    randomise,
    tree_hash,
    write_tokens,
)
from liar_kill import Bench, Work, compress, differences, resume
from torch import Tensor

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.calibration import Batch
from liar_ext.engine import policy as module
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import Execution
from liar_ext.engine.policy import MASKS, PolicyPass
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import DeviceShelf, DiskShelf
from liar_ext.engine.store import InMemory
from liar_ext.models import adapter_for, linear

CPU = torch.device("cpu")


def setting(tmp_path: Path, decoder: bool = True, **changes: Any) -> tuple[Recipe, Any]:
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": LENGTH,
        "batch_size": 4,
        "sparsity": 0.5,
        "target": ("ffn", "heads"),
        "criterion": "policy",
        "allocation": "ranked",
        "policy_steps": 5,
    }
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=decoder)


def the_pass(model: Any, batches: Any, recipe: Recipe, shelf: Any = None) -> PolicyPass:
    layers = len(adapter_for(model.config).layer_list(model)[1])
    return PolicyPass(
        Runtime(InMemory(model), CPU, Clock(CPU), shelf=shelf or DeviceShelf()),
        batches,
        recipe,
        range(*(recipe.layers or (0, layers))),
    )


def padded(batches: Any) -> list[Batch]:
    made = []
    for number, batch in enumerate(batches):
        mask = torch.ones_like(batch.attention_mask)
        mask[:2, 15 - number :] = False
        made.append(Batch(batch.input_ids, mask))
    return made


def masked(model: Any, places: dict[tuple[int, str], Tensor]) -> Any:
    """A copy whose consumers have zeros for the columns of units that are masked."""
    model = copy.deepcopy(model)
    for (index, kind), mask in places.items():
        site = adapter_for(model.config).sites_of(model, index, (kind,))[0]
        wide = mask.repeat_interleave(site.columns_per_unit).float()
        linear.set_weight(site.consumer, site.weight() * wide)
    return model


def loss_by_hand(model: Any, dense: Any, batch: Batch) -> float:
    """Of a whole model, as its users call it."""
    mask = batch.attention_mask
    found = outputs(model, batch.input_ids, attention_mask=mask.long()).double()
    wanted = outputs(dense, batch.input_ids, attention_mask=mask.long()).double()
    if hasattr(model, "lm_head"):
        total, count = 0.0, 0
        for row in range(len(mask)):
            length = int(mask[row].sum())
            targets = batch.input_ids[row, 1:length]
            for sign, logits in ((1.0, found), (-1.0, wanted)):
                own = F.cross_entropy(logits[row, : length - 1], targets, reduction="sum")
                total += sign * float(own)
            count += length - 1
        return total / count
    return float((found - wanted)[mask].square().sum() / wanted[mask].square().sum())


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "last"])
@pytest.mark.parametrize("name", ["llama-gqa-biases", "gpt2", "opt-post-norm", "bert"])
@torch.no_grad()
def test_losses_are_those_of_models_whose_columns_are_zero(tmp_path, name, layers):
    recipe, batches = setting(tmp_path, layers=layers)
    batches = padded(batches)
    model = FAMILIES[name].build()
    search = the_pass(model, batches, recipe)
    policy = search._started(search._measure())
    drawn = policy.draw(MASKS)
    by_site = search._by_site(drawn)
    for number in (0, 3):
        found = search._losses(number, drawn)
        for place in (0, MASKS - 1):
            own = {key: masks[place] for key, masks in by_site.items()}
            expected = loss_by_hand(masked(model, own), model, batches[number])
            assert found[place] == pytest.approx(expected, rel=2e-4, abs=2e-6)


def test_the_search_starts_from_wanda_with_the_share_that_stays(tmp_path):
    recipe, batches = setting(tmp_path, sparsity=0.3)
    model = FAMILIES["llama-mha"].build()
    search = the_pass(model, batches, recipe)
    with torch.no_grad():
        scores = search._measure()
        policy = search._started(scores)
    by_site = search._by_site(policy.keep)
    assert set(by_site) == {(i, kind) for i in range(2) for kind in ("ffn", "heads")}
    for kind, keep in policy.keep.items():
        assert float(keep.mean()) == pytest.approx(0.7), kind
    # in the order of Wanda's scores of raw activations
    site = adapter_for(model.config).sites_of(model, 1, ("ffn",))[0]
    seen: list[Tensor] = []
    site.consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        outputs(model, batch.input_ids)
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()
    wanda = site.weight().double().abs().mean(0) * x.square().mean(0).sqrt()
    assert torch.equal(by_site[1, "ffn"].argsort(), wanda.argsort())


def test_the_best_mask_of_a_small_model_is_found(tmp_path, monkeypatch):
    """Half of the neurons of each layer have no output, and the search starts from even odds: what
    is left computes what the dense model did."""
    config = FAMILIES["bert"].build().config
    config.intermediate_size = 6
    model = randomise(type(FAMILIES["bert"].build())(config), seed=2)
    dead = torch.tensor([True, False, False, True, True, False])
    for index in range(2):
        site = adapter_for(config).sites_of(model, index, ("ffn",))[0]
        linear.set_weight(site.consumer, 3 * site.weight() * ~dead)
    monkeypatch.setattr(module, "STEP_SIZE", 0.1)
    monkeypatch.setattr(module, "_standardised", torch.zeros_like)
    recipe, batches = setting(tmp_path, False, target=("ffn",), policy_steps=60, reconstruct="none")
    dense = copy.deepcopy(model)
    report = liar_ext.prune(model, batches, recipe)
    assert [site.units_after for site in report.sites] == [3, 3]
    assert report.run["policy"]["last"] < 0.5 * report.run["policy"]["first"]
    assert (outputs(model) - outputs(dense)).abs().max() < 1e-4


def test_the_shelf_does_not_show_and_is_empty_afterwards(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-gqa-biases"].build()
    (tmp_path / "shelf").mkdir()
    here = the_pass(model, batches, recipe).results(None)
    away = the_pass(model, batches, recipe, DiskShelf(tmp_path / "shelf", CPU)).results(None)
    assert not list((tmp_path / "shelf").iterdir())
    assert all(torch.equal(here[key], away[key]) for key in here)
    other, _ = setting(tmp_path, seed=5)
    changed = the_pass(model, batches, other).results(None)
    assert not all(torch.equal(here[key], changed[key]) for key in here)


@pytest.mark.parametrize("family", ["llama-gqa-biases", "llama-tied", "bert"])
@pytest.mark.parametrize("allocation", ["ranked", "uniform"])
def test_from_disk_to_disk_is_what_happens_in_memory(tmp_path, family, allocation):
    decoder = FAMILIES[family].decoder
    recipe, batches = setting(tmp_path, decoder=decoder, allocation=allocation)
    FAMILIES[family].build().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    before = tree_hash(tmp_path / "dense")
    report = liar_ext.compress(
        tmp_path / "dense", tmp_path / "out", recipe, execution=Execution(hidden_states="disk")
    )
    assert tree_hash(tmp_path / "dense") == before
    model = FAMILIES[family].build()
    other = liar_ext.prune(model, batches, recipe)
    stored = liar_ext.load(tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value), name
    found = report.run["policy"]
    assert found == other.run["policy"]
    assert (found["steps"], found["masks"], found["dropped"]) == (5, 5 * MASKS, 0)
    assert found["loss"] == ("next token" if decoder else "last hidden states")
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_units_at_the_ends_are_ranked_by_what_they_started_from(tmp_path, monkeypatch):
    """Every unit is at 0 or 1 at once; what `uniform` keeps of each Site is as Wanda has it."""
    recipe, batches = setting(tmp_path, target=("ffn",), allocation="uniform", policy_steps=1)

    def step(self, losses, masks, size):
        for kind, keep in self.keep.items():
            # all of one layer, none of the other
            self.keep[kind] = (torch.arange(len(keep)) < len(keep) // 2).double()
        return len(losses)

    kept = {}
    for criterion in ("policy", "wanda"):
        with monkeypatch.context() as patched:
            patched.setattr("liar_ext.ops.policy.Policy.step", step)
            model = FAMILIES["llama-mha"].build()
            own = dataclasses.replace(recipe, criterion=criterion, reconstruct="none")
            own = dataclasses.replace(own, statistics="oneshot")
            liar_ext.prune(model, batches, own)
        kept[criterion] = [layer.mlp.down_proj.weight for layer in model.model.layers]
    for found, wanda in zip(kept["policy"], kept["wanda"], strict=True):
        assert torch.equal(found, wanda)


# breaks


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("policy"))


def test_a_search_that_is_killed_goes_on_from_its_last_entry(bench, tmp_path):
    recipe = bench.recipe(criterion="policy", allocation="ranked", policy_steps=6, batch_size=8)
    work = Work(bench.source, tmp_path / "out", recipe)
    # during the search, while it keeps how far it is, and after it
    kills = [("journal half written", 3), ("layer computed", 14), ("site half pruned", 2)]
    for at, nth in kills:
        end = compress(work if at == kills[0][0] else work.resumed(), at=at, nth=nth)
        assert end.killed, (at, end)
    resume(work)
    assert not differences(bench.whole(recipe), work.out)


def test_finished_steps_are_not_repeated(tmp_path, monkeypatch):
    recipe, _ = setting(tmp_path, policy_steps=6)
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    liar_ext.compress(tmp_path / "dense", tmp_path / "whole", recipe)
    real, calls = PolicyPass._losses, []

    def losses(self, number, masks):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, number, masks)

    monkeypatch.setattr(PolicyPass, "_losses", losses)
    every = Execution(journal_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=every)
    again = Execution(journal_seconds=0, resume=True)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=again)
    # four of the first run, and the two that were left
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    assert report.run["policy"]["steps"] == 6
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")
    )
    assert first == second


# what cannot be


def test_a_dense_loss_that_is_not_finite_is_refused(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(InputError, match="the dense model's loss on the calibration windows is"):
        liar_ext.prune(model, batches, recipe)


def test_dense_states_of_an_encoder_that_are_not_finite_are_refused(tmp_path):
    recipe, batches = setting(tmp_path, decoder=False, target=("heads",))
    model = FAMILIES["bert"].build()
    model.encoder.layer[1].output.LayerNorm.forward = lambda x: torch.full_like(x, float("nan"))
    with pytest.raises(InputError, match="last hidden states are NaN or infinite"):
        liar_ext.prune(model, batches, recipe)


def test_masks_without_any_finite_loss_are_refused(tmp_path, monkeypatch):
    recipe, batches = setting(tmp_path, policy_steps=50)
    monkeypatch.setattr(PolicyPass, "_loss", lambda self, head, number, item: float("nan"))
    with pytest.raises(InputError, match="no mask of the last 6 steps has a finite loss"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    # nor where not every batch has its turn
    recipe, batches = setting(tmp_path, policy_steps=4)
    with pytest.raises(InputError, match="no mask of the last 4 steps has a finite loss"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)


def test_failures_of_an_interrupted_search_count_on(tmp_path, monkeypatch):
    recipe, _ = setting(tmp_path, policy_steps=4)
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(PolicyPass, "_loss", lambda self, head, number, item: float("nan"))
    real, calls = PolicyPass._losses, []

    def losses(self, number, masks):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, number, masks)

    monkeypatch.setattr(PolicyPass, "_losses", losses)
    for resume_, expected in ((False, KeyboardInterrupt), (True, InputError)):
        execution = Execution(journal_seconds=0, resume=resume_)
        with pytest.raises(expected):
            liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe, execution=execution)
    assert calls == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("broken", [range(2), range(10, 12)], ids=["first", "last"])
def test_steps_without_a_finite_loss_have_no_mean_in_the_report(tmp_path, monkeypatch, broken):
    recipe, _ = setting(tmp_path, policy_steps=12)
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    real, calls = PolicyPass._losses, []

    def losses(self, number, masks):
        calls.append(number)
        found = real(self, number, masks)
        return [float("nan")] * len(found) if len(calls) - 1 in broken else found

    monkeypatch.setattr(PolicyPass, "_losses", losses)
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    found = report.run["policy"]
    first, last = ("first", "last") if 0 in broken else ("last", "first")
    assert (found[first], found["dropped"]) == (None, 2 * MASKS)
    assert isinstance(found[last], float)


def test_a_batch_without_a_next_token_has_no_step(tmp_path, monkeypatch):
    recipe, batches = setting(tmp_path, policy_steps=4)
    short = Batch(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool))
    real, calls = PolicyPass._losses, []

    def losses(self, number, masks):
        calls.append(number)
        return real(self, number, masks)

    monkeypatch.setattr(PolicyPass, "_losses", losses)
    search = the_pass(FAMILIES["llama-mha"].build(), [short, *batches[:2]], recipe)
    found = search.results(None)
    assert calls == [1, 2, 1, 2]
    assert all(bool(keep.isfinite().all()) for keep in found.values())
    # the encoder's loss is of hidden states, which one token has
    calls.clear()
    the_pass(FAMILIES["bert"].build(), [short, *batches[:2]], recipe).results(None)
    assert calls == [0, 1, 2, 0]


def test_windows_without_a_next_token_are_refused(tmp_path):
    recipe, _ = setting(tmp_path)
    ones = [torch.randint(3, 90, (100, 1))]
    with pytest.raises(InputError, match="no next token to predict"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), ones, recipe)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_the_number_of_steps_is_checked(value):
    with pytest.raises(InputError, match="--policy-steps"):
        Recipe(policy_steps=value)

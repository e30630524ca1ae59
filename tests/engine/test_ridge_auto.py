"""`--ridge auto`: each Site gets the ridge that is best on tokens that the fit has not seen."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from liar_families import FAMILIES, batches_of, write_tokens

import liar_ext
from liar_ext import Execution, InputError, Recipe, planning
from liar_ext.calibration.batch import Batch, cut_to
from liar_ext.cli import main
from liar_ext.engine import ridge as engine_ridge
from liar_ext.engine import statistics
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.ridge import SLACK, choose
from liar_ext.engine.statistics import HELD_OUT, SiteMoments, held_out, segments
from liar_ext.models import adapter_for
from liar_ext.ops import gram_reference, interpolate_reference, residual_reference
from liar_ext.ops.drift import Sample
from liar_ext.recipe import RIDGES
from liar_ext.reconstruction import RECONSTRUCTIONS, Task
from liar_ext.report import Report

CENTER = pytest.mark.parametrize("center", [True, False], ids=["affine", "plain"])
FITS = [name for name, r in RECONSTRUCTIONS.items() if r.sweep is not None]


def weakest(errors: dict[float, float]) -> float:
    """The rule: the least ridge within `SLACK` of the least error."""
    return min(r for r, error in errors.items() if error <= SLACK * min(errors.values()))


def batches(*rows: int, length: int = 6) -> list[Batch]:
    made = []
    for count in rows:
        ids = torch.arange(count * length).view(count, length)
        made.append(Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    return made


def errors_of(rest, held, weight, keep, drop, center) -> dict[float, float]:
    """The definition: of each ridge, the fit to `rest` by lstsq, measured on `held`."""
    found = {}
    for ridge in RIDGES:
        q, p = interpolate_reference(rest, keep, drop, ridge, center)
        dropped = weight[:, drop].double()
        new = weight[:, keep].double() + dropped @ q.T
        shift = dropped @ p if center else None
        found[ridge] = residual_reference(held, weight, keep, new, shift)
    return found


# what is held out


def test_one_segment_in_five_is_held_out_spread_over_the_tokens():
    assert sorted(held_out(64)) == list(range(2, 64, 5))
    assert sorted(held_out(5)) == [2]
    for count in (2, 3, 4):
        assert len(held_out(count)) == 1, "of few segments there is one"
    assert held_out(1) == held_out(0) == frozenset()


def test_few_tokens_are_cut_into_enough_segments_and_batches():
    assert segments(batches(8, 8, 8, 8, 8, 8)) == [0] * 6
    assert segments(batches(8, 8, 8, 8, 8, 8), HELD_OUT)[-1] == HELD_OUT - 1
    whole = batches(7, 8)
    cut = cut_to(whole, HELD_OUT)
    assert len(cut) >= HELD_OUT
    assert torch.equal(
        torch.cat([b.input_ids for b in cut]), torch.cat([b.input_ids for b in whole])
    )
    assert cut_to(whole, 2) == tuple(whole)
    assert len(cut_to(batches(3), HELD_OUT)) == 3, "a sequence stays whole"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_tokens_are_the_same_with_and_without_a_part_on_its_own(dtype):
    options = {"dtype": dtype, "alone": False}
    plain = SiteMoments(7, torch.device("cpu"), **options)
    both = SiteMoments(7, torch.device("cpu"), **options, held_out=frozenset({1}))
    rows = [torch.randn(40, 7) for _ in range(3)]
    for segment, x in enumerate(rows):
        plain.add(x, None, segment)
        both.add(x, None, segment)
    ranks = Ranks.single()
    whole, held = both.finish(ranks), both.finish_held(ranks)
    expected = plain.finish(ranks)
    assert torch.equal(whole.gram.tril(), expected.gram.tril()) or dtype == torch.float64
    assert torch.allclose(whole.gram.tril(), expected.gram.tril())
    assert torch.equal(whole.sum, expected.sum) and int(held.count) == 40
    part = gram_reference(rows[1])
    assert torch.allclose(held.gram.double().tril(), part.gram.tril(), rtol=1e-5)
    assert torch.allclose(held.sum, part.sum)
    assert held.gram.dtype == dtype
    assert plain.finish_held(ranks) is None


def test_one_sample_is_refused_by_name(tmp_path):
    recipe = Recipe(calibration=str(write_tokens(tmp_path / "t.npy", samples=1, length=64)))
    recipe = dataclasses.replace(recipe, ridge="auto", samples=1, seq_len=64)
    with pytest.raises(InputError, match="--ridge auto: holds out .* only 1; raise --samples"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), batches_of(recipe, decoder=True), recipe)


def test_too_few_tokens_are_counted_without_those_that_are_held_out(tmp_path):
    """60 tokens for 48 columns, 12 of them held out: 48 are left; one sample less is too few."""
    calibration = str(write_tokens(tmp_path / "t.npy", samples=10, length=6))
    recipe = Recipe(calibration=calibration, samples=10, seq_len=6, batch_size=2, sparsity=0.5)
    parts = batches_of(recipe, decoder=True)
    auto = dataclasses.replace(recipe, ridge="auto")
    assert statistics.held_out_tokens(parts, auto) == 12
    assert statistics.held_out_tokens(parts, recipe) == 0
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), parts, auto)
    assert any("60 calibration tokens" in w and "12 are held out" in w for w in report.warnings)
    fewer = [*parts[:4], Batch(parts[4].input_ids[:1], parts[4].attention_mask[:1])]
    liar_ext.prune(FAMILIES["llama-mha"].build(), fewer, recipe)
    with pytest.raises(InputError, match="54 calibration tokens for 48 columns: 12 are held out"):
        liar_ext.prune(FAMILIES["llama-mha"].build(), fewer, auto)


# the choice


def problem(tokens=90, columns=30, kept=18, outputs=9):
    """Few tokens for the width, so that the ridge matters."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = (torch.randn(tokens, columns, generator=generator) @ mix).double()
    x += torch.randn(columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    order = torch.randperm(columns, generator=generator)
    keep, drop = order[:kept].sort().values, order[kept:].sort().values
    return x[18:], x[:18], weight, keep, drop


@CENTER
@pytest.mark.parametrize("slack", [1.0, 1.2, SLACK])
def test_it_is_the_weakest_of_the_grid_that_does_on_held_out_tokens(center, slack, monkeypatch):
    """With a slack of 1 that is the least held-out error itself."""
    monkeypatch.setattr(engine_ridge, "SLACK", slack)
    rest, held, weight, keep, drop = problem()
    expected = errors_of(rest, held, weight, keep, drop, center)
    task = Task(gram_reference(torch.cat([rest, held])), weight, keep, drop, 1e-4, center)
    found = choose(task, Sample(gram_reference(held)), RECONSTRUCTIONS["liar"], Ranks.single())
    assert found.errors == pytest.approx(expected, rel=1e-6)
    if slack == 1.0:
        assert found.ridge == min(expected, key=expected.__getitem__)
        assert min(RIDGES) < found.ridge < max(RIDGES), "a test in which neither end is best"
    enough = slack * min(expected.values())
    assert found.ridge == min(r for r, error in expected.items() if error <= enough)


@pytest.mark.parametrize("name", FITS)
@CENTER
def test_every_fit_is_judged_by_what_it_does_to_held_out_tokens(center, name):
    rest, held, weight, keep, drop = problem(tokens=300)
    task = Task(gram_reference(torch.cat([rest, held])), weight, keep, drop, 1e-4, center, unit=3)
    found = choose(task, Sample(gram_reference(held)), RECONSTRUCTIONS[name], Ranks.single())
    of_rest = dataclasses.replace(task, moments=gram_reference(rest))
    for ridge in (1e-2, 1.0):
        part = RECONSTRUCTIONS[name].repair(dataclasses.replace(of_rest, ridge=ridge))
        expected = residual_reference(held, weight, keep, part.weight, part.shift)
        assert found.errors[ridge] == pytest.approx(expected, rel=1e-4)
    assert found.ridge == weakest(found.errors)


@pytest.mark.parametrize("name", ["liar", "mask-tuning"])
def test_ranks_choose_together(name):
    rest, held, weight, keep, drop = problem()
    task = Task(gram_reference(torch.cat([rest, held])), weight, keep, drop, 1e-4, True)
    reconstruction = RECONSTRUCTIONS[name]
    whole = choose(task, Sample(gram_reference(held)), reconstruction, Ranks.single())
    given = []

    class One(Ranks):
        def sum_(self, tensor):
            given.append(tensor.clone())
            return tensor

        def broadcast(self, value, source=0):
            given.append(value.clone())
            return value

    for rows in (slice(0, 4), slice(4, 9)):
        own = task if reconstruction.whole else dataclasses.replace(task, weight=weight[rows])
        choose(own, Sample(gram_reference(held)), reconstruction, One())
    total = given[0] if reconstruction.whole else sum(given)
    errors = (total[:-1] / total[-1]).tolist()
    assert errors == pytest.approx(list(whole.errors.values()), rel=1e-9)


def test_ridges_that_do_not_hold_are_left_out():
    """A kept column twice, and means that float32 Moments are rounded at the size of."""
    rest, held, weight, keep, drop = problem()
    x = torch.cat([rest, held]) + 5.0
    x[:, keep[1]] = x[:, keep[0]]
    moments, part = gram_reference(x), gram_reference(x[-18:])
    for some in (moments, part):
        some.gram = some.gram.float()
    task = Task(moments, weight, keep, drop, 1e-4, True)
    found = choose(task, Sample(part), RECONSTRUCTIONS["liar"], Ranks.single())
    assert min(RIDGES) not in found.errors and 1.0 in found.errors


# whole compressions


def setting(tmp_path, **changes):
    base = {"calibration": str(write_tokens(tmp_path / "t.npy")), "samples": 24, "seq_len": 24}
    base |= {"batch_size": 4, "sparsity": 0.5, "ridge": "auto"}
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=True)


@pytest.mark.parametrize("bias", ["never", "always"])
@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
def test_the_ridge_of_a_site_is_what_raw_activations_say(statistics, bias, tmp_path):
    recipe, parts = setting(tmp_path, statistics=statistics, bias=bias, layers=(0, 1))
    model = FAMILIES["llama-mha"].build()
    before = copy.deepcopy(model)
    site = adapter_for(model.config).sites_of(before, 0, ("ffn",))[0]
    seen: list[torch.Tensor] = []
    site.consumer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for part in parts:
            before(input_ids=part.input_ids)
    report = liar_ext.prune(model, parts, recipe)
    # six batches are five segments
    numbers = segments(parts, HELD_OUT)
    chosen = held_out(numbers[-1] + 1)
    x = [a.flatten(0, 1) for a in seen]
    held = torch.cat([a for a, n in zip(x, numbers, strict=True) if n in chosen]).double()
    rest = torch.cat([a for a, n in zip(x, numbers, strict=True) if n not in chosen]).double()
    assert 0.1 < len(held) / (len(held) + len(rest)) < 0.4
    scores = site.weight().abs().mean(0) * torch.cat(x).square().mean(0).sqrt()
    keep = scores.argsort(descending=True)[:24].sort().values
    drop = scores.argsort(descending=True)[24:].sort().values
    expected = errors_of(rest, held, site.weight().detach(), keep, drop, bias == "always")
    (found,) = report.sites
    got = {float(ridge): error for ridge, error in found.held_out.items()}
    assert found.ridge == found.ridge_used == weakest({ridge: expected[ridge] for ridge in got})
    assert got == pytest.approx({ridge: expected[ridge] for ridge in got}, rel=1e-3)
    assert report.recipe["ridge"] == "auto"
    assert Report.from_json(json.loads(json.dumps(report.to_json()))).sites == report.sites


def test_the_final_fit_has_all_tokens(tmp_path, monkeypatch):
    """To the bit that of the number which was chosen, where segments are the same."""
    monkeypatch.setattr(statistics, "CHUNK_TOKENS", 96)
    recipe, parts = setting(tmp_path, layers=(0, 1), target=("ffn",))
    auto, fixed = FAMILIES["llama-mha"].build(), FAMILIES["llama-mha"].build()
    report = liar_ext.prune(auto, parts, recipe)
    liar_ext.prune(fixed, parts, dataclasses.replace(recipe, ridge=report.sites[0].ridge))
    ours, theirs = auto.state_dict(), fixed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", [*FITS, "none", "bias"])
@pytest.mark.parametrize("family", ["llama-gqa-biases", "llama-mha", "gpt2"])
def test_every_reconstruction_on_ffn_and_heads(family, name, tmp_path):
    recipe, parts = setting(tmp_path, target=("ffn", "heads"), reconstruct=name)
    model = FAMILIES[family].build()
    report = liar_ext.prune(model, parts, recipe)
    assert {site.kind for site in report.sites} == {"ffn", "heads"}
    for site in report.sites:
        assert 0 < site.relative_residual < 2
        assert (site.ridge in RIDGES) == (name in FITS) == bool(site.held_out)
        assert (site.iterations is not None) == (name == "admm")
    ids = parts[0].input_ids
    assert bool(model(input_ids=ids).logits.isfinite().all())


@pytest.mark.parametrize("criterion", ["obs", "leverage"])
def test_criteria_that_look_ahead_take_the_default_ridge(criterion, tmp_path):
    recipe, parts = setting(tmp_path, criterion=criterion, layers=(0, 1))
    auto, fixed = FAMILIES["llama-mha"].build(), FAMILIES["llama-mha"].build()
    liar_ext.prune(auto, parts, recipe)
    liar_ext.prune(fixed, parts, dataclasses.replace(recipe, ridge=Recipe().ridge))
    for name in ("gate_proj", "up_proj"):
        ours, theirs = (getattr(m.model.layers[0].mlp, name).weight for m in (auto, fixed))
        assert torch.equal(ours, theirs)


def test_a_batch_or_two_are_enough(tmp_path):
    recipe, parts = setting(tmp_path, batch_size=24)
    assert len(parts) == 1
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), parts, recipe)
    assert all(site.held_out for site in report.sites)


def test_a_library_has_both_parts(tmp_path, monkeypatch):
    """What was kept saves the forward, whether it has the held-out part or gets it then."""
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(statistics, "CHUNK_TOKENS", 96)
    recipe, _ = setting(tmp_path, statistics="oneshot", target=("ffn", "heads"))
    fixed = dataclasses.replace(recipe, ridge=1e-2)
    execution = Execution(moments=tmp_path / "kept")

    def weights(name, recipe, execution=None):
        report = liar_ext.compress(tmp_path / "dense", tmp_path / name, recipe, execution=execution)
        return (tmp_path / name / "model.safetensors").read_bytes(), report

    expected, _ = weights("alone", recipe)
    assert weights("fixed", fixed, execution)[0] == weights("fixed-alone", fixed)[0]
    assert not list((tmp_path / "kept").glob("*held-out*"))
    added, _ = weights("added", recipe, execution)
    assert len(list((tmp_path / "kept").glob("*held-out*"))) == 4
    again, report = weights("again", recipe, execution)
    assert expected == added == again
    assert report.seconds["forward"] == 0.0
    assert weights("fixed-again", fixed, execution)[0] == weights("fixed-third", fixed)[0]


def test_a_library_of_other_segments_is_refused_by_name(tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path, statistics="oneshot")
    execution = Execution(moments=tmp_path / "kept")
    fixed = dataclasses.replace(recipe, ridge=1e-2)
    liar_ext.compress(tmp_path / "dense", tmp_path / "one", fixed, execution=execution)
    with pytest.raises(InputError, match="segments"):
        liar_ext.compress(tmp_path / "dense", tmp_path / "two", recipe, execution=execution)
    assert not (tmp_path / "two").exists()


def test_global_allocation_scores_first(tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path, allocation="global", statistics="oneshot")
    report = liar_ext.compress(tmp_path / "dense", tmp_path / "out", recipe)
    assert all(site.held_out for site in report.sites if site.units_after < site.units_before)


def test_the_plan_counts_the_choice(tmp_path):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path, batch_size=24)
    rates = dict.fromkeys(("forward", "gram", "solve", "residual"), 1e9)
    auto = planning.plan(tmp_path / "dense", recipe, rates=rates)
    fixed = dataclasses.replace(recipe, ridge=1e-4)
    plain = planning.plan(tmp_path / "dense", fixed, rates=rates)
    assert auto["calibration"]["segments"] == HELD_OUT
    assert auto["calibration"]["held_out"] > 0 == plain["calibration"]["held_out"]
    assert auto["calibration"]["minimum"] > plain["calibration"]["minimum"] == 48
    assert auto["flops"]["solve"] > 5 * plain["flops"]["solve"]
    phases = {phase["name"]: phase["device"] for phase in auto["phases"]["all"]}
    assert phases["statistics of ffn"]["held_out_sums"] == 8 * 48**2
    assert phases["repair of ffn"]["held_out_moments"] == 4 * 48**2


def test_the_command_line_takes_the_word(tmp_path, capsys):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    tokens = str(write_tokens(tmp_path / "t.npy"))
    given = [str(tmp_path / "dense"), "--calibration", tokens, "--seq-len", "24"]
    line = ["prune", *given, "--out", str(tmp_path / "out"), "--ridge", "auto", "--json"]
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["recipe"]["ridge"] == "auto"
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert kept["ridge"] == "auto" and Recipe.from_json(kept).chooses_ridge
    assert "auto (chosen on held-out tokens)" in (tmp_path / "out" / "README.md").read_text()
    assert main(["report", str(tmp_path / "out")]) == 0
    with pytest.raises(SystemExit) as refused:
        main(["prune", *given, "--out", str(tmp_path / "no"), "--ridge", "best"])
    assert refused.value.code == 2 and "--ridge" in capsys.readouterr().err

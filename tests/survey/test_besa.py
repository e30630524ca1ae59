"""besa: soft gates and their gradients against definitions, and splits that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch
from liar_families import FAMILIES, batches_of, write_tokens
from torch import Tensor

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.calibration import Batch
from liar_ext.engine.block import LayerBlock
from liar_ext.engine.clock import Clock
from liar_ext.engine.driver import Driver
from liar_ext.engine.execution import Execution
from liar_ext.engine.gates import gated
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import DeviceShelf, DiskShelf
from liar_ext.engine.store import InMemory
from liar_ext.models import adapter_for, linear
from liar_ext.survey import besa

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def few_steps(monkeypatch) -> None:
    """For tests of what is around the learning."""
    monkeypatch.setattr(besa, "STEPS", 2)


# soft gates


@pytest.mark.parametrize("units", [1, 4, 7, 100, 257])
def test_a_soft_gate_is_one_minus_the_share_of_rates_that_remove_its_rank(units):
    beta = drawn(3, len(besa.CANDIDATES)).softmax(-1)
    found = besa.soft_gates(beta, units)
    for row in range(3):
        for rank in range(units):
            gone = sum(
                float(beta[row, d])
                for d in range(101)
                # exact: d / 100 of the units, the last one stays
                if min(units * d // 100, units - 1) > rank
            )
            assert float(found[row, rank]) == pytest.approx(1 - gone, abs=1e-12)


def test_the_first_logits_have_the_rate_and_the_largest_entropy():
    rates = torch.tensor([0.03, 0.125, 0.5, 0.97], dtype=torch.float64)
    theta = besa.starting(rates)
    beta = theta.softmax(-1)
    assert (beta @ besa.CANDIDATES - rates).abs().max() < 1e-9
    # of a given mean, what is linear in the rates (Gibbs)
    assert theta.diff(n=2, dim=-1).abs().max() < 1e-9


def test_any_rate_can_be_learned():
    """The published `softmax(sigmoid(θ))` cannot leave [0.38, 0.62]."""
    towards = (besa.CANDIDATES - 0.5) * 1e4
    for sign, limit in ((1.0, 1.0), (-1.0, 0.0)):
        theta = sign * towards
        assert float(theta.softmax(-1) @ besa.CANDIDATES) == pytest.approx(limit, abs=1e-9)
        bounded = theta.sigmoid().softmax(-1) @ besa.CANDIDATES
        assert 0.37 < float(bounded) < 0.63


def test_the_gradient_of_logits_is_autograds_through_straight_through_gates():
    units, rates = (9, 30), torch.tensor([0.25, 0.6], dtype=torch.float64)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    ranks = [drawn(n, seed=n).argsort() for n in units]
    curve = [drawn(n, n, seed=n + 1) for n in units]
    theta = drawn(2, 2, 101, seed=5)

    def error(gates: Sequence[Tensor]) -> Tensor:
        """Something that is not linear, and in which Sites see each other."""
        first, second = ((1 - g) @ c for g, c in zip(gates, curve, strict=True))
        return first.square().sum() * second.square().sum()

    leaf = theta.clone().requires_grad_()
    total, slopes = torch.zeros((), dtype=torch.float64), []
    for row in range(2):
        gates, shares_gone = [], []
        for site, n in enumerate(units):
            beta = leaf[row, site].softmax(0)
            alpha = (beta * besa.CANDIDATES).sum()
            share = sum(beta[d] * min(n * d // 100, n - 1) / n for d in range(101))
            gone = torch.tensor(
                [[float(min(n * d // 100, n - 1) > k) for d in range(101)] for k in range(n)],
                dtype=torch.float64,
            )
            soft = (1 - gone @ beta)[ranks[site]]
            hard = (ranks[site] >= int(n * float(alpha.detach()))).double()
            gates.append(hard - soft.detach() + soft)
            shares_gone.append(share)
        mean = 0.3 * shares_gone[0] + 0.7 * shares_gone[1]
        total = total + error(gates) + 5.0 * ((mean - rates[row]) / rates[row]) ** 2
        leaves = [gate.detach().requires_grad_() for gate in gates]
        slopes.append(torch.autograd.grad(error(leaves), leaves))
    (expected,) = torch.autograd.grad(total, leaf)
    found = besa.gradient(theta, slopes, ranks, rates, shares)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


# splits


class Sum:
    """A block whose error is a weighted sum over units that are gone, known in closed form."""

    def __init__(self, losses: Sequence[Tensor], costs: Sequence[int]) -> None:
        self.units, self.costs, self.batches = [len(own) for own in losses], costs, 4
        self._losses = losses

    def slopes(self, trials):
        return [[-own for own in self._losses] for _ in trials]

    def errors(self, gates):
        return [
            sum(float(((1 - g) * own).sum()) for g, own in zip(of, self._losses, strict=True))
            for of in gates
        ]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_rate_counts_what_can_go_of_it(heads):
    """A Site of few units with most of the cost cannot lose a fraction of one, nor its last."""
    losses = [torch.linspace(0.01, 0.04, units, dtype=torch.float64) for units in (heads, 40)]
    costs = (40 // heads, 1)
    found = besa.learn(losses, Sum(losses, costs))
    most = 1 - (costs[0] + 1) / 80
    for rate, level in zip(besa.LEARNED, found[-len(besa.LEARNED) :], strict=True):
        gone = 1 - float(level[1] * costs[0] + level[2] * costs[1]) / 80
        if 1 / heads / 2 < rate <= most or heads == 1:
            assert 0.65 * min(rate, most) < gone < 1.2 * rate, (rate, gone, level)


@pytest.mark.parametrize("useless", [0, 1])
@pytest.mark.parametrize("costs", [(1, 1), (4, 1)])
def test_what_is_useless_goes_first(useless, costs):
    losses = [torch.linspace(0.01, 0.04, 40, dtype=torch.float64) for _ in range(2)]
    losses[useless] = 1e-6 * losses[useless]
    block = Sum(losses, costs)
    found = besa.learn(losses, block)
    levels = 1 + len(besa.EVEN) + len(besa.LEARNED) + 1
    assert found.shape == (levels, 3)
    assert found[0].tolist() == [0.0, 40.0, 40.0]
    assert found[1 + len(besa.EVEN)].tolist()[1:] == [1.0, 1.0]
    learned = found[-len(besa.LEARNED) :]
    shares = torch.tensor(costs, dtype=torch.float64) / sum(costs)
    for rate, level in zip(besa.LEARNED, learned, strict=True):
        gone = 1 - level[1:] / 40
        if rate < float(shares[useless]):
            # there is room for all of it in the useless Site: the penalty is soft, and near it
            assert float(gone @ shares) == pytest.approx(rate, abs=0.05)
        assert float(gone[useless]) > float(gone[1 - useless])
        even = found[1 + besa.EVEN.index(rate)]
        assert float(level[0]) < float(even[0])


def test_one_site_alone_has_nothing_to_learn():
    losses = [torch.linspace(0.01, 0.04, 40, dtype=torch.float64)]

    class Deaf(Sum):
        def slopes(self, trials):
            raise AssertionError("nothing to learn")

    found = besa.learn(losses, Deaf(losses, [3]))
    assert found.shape == (1 + len(besa.EVEN) + 1, 2)
    expected = [40 - math.floor(40 * rate) for rate in besa.EVEN]
    assert found[1:-1, 1].tolist() == expected


# between layers


def test_the_budget_goes_where_the_next_unit_costs_least():
    """Two layers of two Sites: enumerated."""

    def layer(scale: float) -> Tensor:
        rows = [[0.0, 8.0, 4.0], [scale, 4.0, 4.0], [1.5 * scale, 8.0, 2.0], [4 * scale, 2.0, 1.0]]
        return torch.tensor(rows, dtype=torch.float64)

    findings = [layer(1.0), layer(3.0)]
    budgets = [
        Budget(kind, units, cost, finding)
        for finding in findings
        for kind, units, cost in (("heads", 8, 5), ("ffn", 4, 10))
    ]
    for sparsity in (0.2, 0.3, 0.5, 0.6):
        most = (1 - sparsity) * 160
        fits = {}
        for first in range(4):
            for second in range(4):
                chosen = [findings[0][first].tolist(), findings[1][second].tolist()]
                if sum(5 * row[1] + 10 * row[2] for row in chosen) <= most:
                    fits[chosen[0][0] + chosen[1][0]] = [*chosen[0][1:], *chosen[1][1:]]
        assert ALLOCATIONS["besa"].wanted(budgets, sparsity) == fits[min(fits)]


# the block of a real layer


def block_of(name, batches: Sequence[Batch], costs=(7, 3)):
    """Of a model, or the name of one."""
    model = FAMILIES[name].build() if isinstance(name, str) else name
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    runtime = Runtime(InMemory(model), CPU, Clock(CPU))
    stream = runtime.stream(batches)
    stream.keeps = True
    with torch.no_grad():
        runtime.embed(stream)
        for index in range(2):
            stream.advance(stream.through(index, (), onward=True))
        sites = adapter.sites_of(model, 1, ("ffn", "heads"))
        block = LayerBlock(runtime, sites, costs, stream)
    return block, layers[1], sites, stream


def two_batches(padded: bool) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for samples, length in ((3, 12), (2, 9)):
        ids = torch.randint(3, 96, (samples, length), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if padded:
            mask[0, 5:] = False
        made.append(Batch(ids, mask))
    return made


def outputs_by_hand(layer, sites, stream, gates) -> list[tuple[Tensor, Tensor]]:
    """Valid rows of the layer's output with gates in its consumers' weights, and without."""
    weights = [site.weight().clone() for site in sites]
    found = []
    for number, batch in enumerate(stream._batches.values()):
        rows = batch.attention_mask.flatten()
        both = []
        for own in (gates, None):
            for place, (site, weight) in enumerate(zip(sites, weights, strict=True)):
                if own is not None:
                    wide = own[place].repeat_interleave(site.columns_per_unit).float()
                    linear.set_weight(site.consumer, weight * wide)
            call = stream.call(number, 1)
            states = layer(stream.entered[number].fetch(), *call.args, **call.kwargs)
            states = states[0] if isinstance(states, tuple) else states
            both.append(states.flatten(0, 1)[rows].double())
            for site, weight in zip(sites, weights, strict=True):
                linear.set_weight(site.consumer, weight)
        found.append((both[0], both[1]))
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["llama-gqa-biases", "gpt2", "bert"])
@torch.no_grad()
def test_errors_are_those_of_columns_that_are_zero(name, padded):
    block, layer, sites, stream = block_of(name, two_batches(padded))
    sets = [[(drawn(s.units, seed=n) > 0).double() for s in sites] for n in (1, 2)]
    sets.append([torch.ones(s.units, dtype=torch.float64) for s in sites])
    found = block.errors(sets)
    for gates, error in zip(sets[:2], found, strict=False):
        pairs = outputs_by_hand(layer, sites, stream, gates)
        pruned, dense = (torch.cat(part) for part in zip(*pairs, strict=True))
        by_channel = (pruned - dense).square().sum(0) / dense.square().sum(0)
        assert error == pytest.approx(float(by_channel.mean()), rel=1e-4)
    assert found[2] == 0


@pytest.mark.parametrize("scale", [1e-12, 1e-16, 1e-19, 1e-22])
@torch.no_grad()
def test_a_channel_of_next_to_nothing_counts_as_far_as_float32_has_it(scale):
    """Channel 0 of the residual stream; left out, its share of the channels counts as no error."""
    small = FAMILIES["llama-mha"].build()
    small.model.embed_tokens.weight[:, 0] *= scale
    for layer in small.model.layers:
        layer.self_attn.o_proj.weight[0] *= scale
        layer.mlp.down_proj.weight[0] *= scale
    block, layer, sites, stream = block_of(small, two_batches(False))
    gates = [(drawn(s.units, seed=1) > 0).double() for s in sites]
    (found,) = block.errors([gates])
    pairs = outputs_by_hand(layer, sites, stream, gates)
    pruned, dense = (torch.cat(part) for part in zip(*pairs, strict=True))
    wanted = dense.square().mean(0) > 1.2e-34
    by_channel = ((pruned - dense).square().sum(0) / dense.square().sum(0))[wanted]
    assert int((~wanted).sum()) == (scale < 1e-17)
    assert found == pytest.approx(float(by_channel.sum()) / len(wanted), rel=1e-4)
    ((first, second),) = block.slopes([(0, [g.clone() for g in gates])])
    assert bool(first.isfinite().all()) and bool(second.isfinite().all())


@torch.no_grad()
def test_errors_and_slopes_that_are_not_finite_name_the_layer():
    block, layer, sites, _ = block_of("llama-mha", two_batches(False))
    gates = [torch.ones(s.units, dtype=torch.float64) for s in sites]
    layer.mlp.act_fn.forward = lambda x: torch.full_like(x, float("inf"))
    for ask in (lambda: block.errors([gates]), lambda: block.slopes([(0, gates)])):
        with pytest.raises(InputError, match=r"model\.layers\.1: with units removed"):
            ask()


def test_slopes_are_finite_differences_of_one_batchs_error():
    block, layer, sites, stream = block_of("llama-mha", two_batches(False))
    layer.double()
    for items in (stream.entered, stream.hidden):
        for number in items:
            items[number] = DeviceShelf().put(items[number].fetch().double())
    gates = [drawn(s.units, seed=9 + n).sigmoid() for n, s in enumerate(sites)]
    for number in (0, 1):
        ((first, second),) = block.slopes([(number, gates)])
        tokens = block._tokens[number]

        def error(own, number=number, tokens=tokens) -> float:
            with besa_gates(sites, own):
                return float(block._of_batch(number, "forward").detach()) / tokens

        for place, (slope, unit) in enumerate(((first, 2), (second, 11))):
            moved = [g.clone() for g in gates]
            moved[place][unit] += 1e-3
            up = error(moved)
            moved[place][unit] -= 2e-3
            expected = (up - error(moved)) / 2e-3
            assert float(slope[unit]) == pytest.approx(expected, rel=2e-2)


@contextmanager
def besa_gates(sites, values):
    with gated(sites) as gates:
        gates.values = [value.double() for value in values]
        yield


def test_nothing_is_left_on_the_shelf(tmp_path, monkeypatch, few_steps):
    """What entered a layer waits one layer longer, and then goes."""
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    (tmp_path / "shelf").mkdir()
    shelf = DiskShelf(tmp_path / "shelf", CPU)
    most = []
    keep = Driver._keep

    def counted(self, position, layer):
        keep(self, position, layer)
        most.append(len(list((tmp_path / "shelf").iterdir())))

    monkeypatch.setattr(Driver, "_keep", counted)
    with torch.no_grad():
        Driver(Runtime(InMemory(model), CPU, Clock(CPU), shelf=shelf), batches, recipe).run()
    assert most[:2] == [2 * len(batches)] * 2
    assert not list((tmp_path / "shelf").iterdir())


def test_hidden_states_that_are_not_finite_name_the_layer(tmp_path):
    recipe, batches = setting(tmp_path)
    model = FAMILIES["llama-mha"].build()
    model.model.layers[1].mlp.act_fn.forward = lambda x: torch.full_like(x, float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        liar_ext.prune(model, batches, recipe)


# whole compressions


def setting(tmp_path, **changes):
    base = {
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": 24,
        "batch_size": 8,
        "sparsity": 0.4,
        "target": ("ffn", "heads"),
        "allocation": "besa",
    }
    recipe = Recipe(**{**base, **changes})
    return recipe, batches_of(recipe, decoder=True)


@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_a_site_whose_consumer_ignores_it_is_what_goes(tmp_path, kind):
    """Of every layer; the other kind stays whole as far as the budget allows."""
    model = FAMILIES["llama-mha"].build()
    adapter = adapter_for(model.config)
    for index in range(2):
        site = adapter.sites_of(model, index, (kind,))[0]
        linear.set_weight(site.consumer, 1e-5 * site.weight())
    recipe, batches = setting(tmp_path, sparsity=0.3, criterion="wanda")
    report = liar_ext.prune(model, batches, recipe)
    lost = {
        own: sum(s.units_before - s.units_after for s in report.sites if s.kind == own)
        / sum(s.units_before for s in report.sites if s.kind == own)
        for own in recipe.target
    }
    other = "ffn" if kind == "heads" else "heads"
    assert lost[kind] > lost[other] + 0.15
    assert report.totals["sparsity"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("criterion", ["obs", "fisher", "magnitude"])
@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
def test_any_criterion_ranks_the_units(tmp_path, few_steps, criterion, statistics):
    recipe, batches = setting(tmp_path, criterion=criterion, statistics=statistics)
    report = liar_ext.prune(FAMILIES["llama-gqa-biases"].build(), batches, recipe)
    assert report.totals["sparsity"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt-post-norm"])
def test_other_families(tmp_path, few_steps, name):
    recipe, batches = setting(tmp_path, target_signal="local", layers=(1, 2))
    report = liar_ext.prune(FAMILIES[name].build(), batches, recipe)
    assert {site.layer for site in report.sites} == {1}
    assert report.totals["sparsity"] == pytest.approx(0.4, abs=0.02)


def test_a_second_path_comes_after_it(tmp_path, few_steps):
    recipe, batches = setting(tmp_path, target_signal="dense")
    report = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, recipe)
    plain, _ = setting(tmp_path)
    other = liar_ext.prune(FAMILIES["llama-mha"].build(), batches, plain)
    assert [s.units_after for s in report.sites] == [s.units_after for s in other.sites]


def test_hidden_states_on_disk_give_the_same_bits(tmp_path, few_steps):
    FAMILIES["llama-mha"].build().save_pretrained(tmp_path / "dense")
    recipe, _ = setting(tmp_path)
    for place in ("device", "disk"):
        execution = Execution(hidden_states=place)
        liar_ext.compress(tmp_path / "dense", tmp_path / place, recipe, execution=execution)
    first, second = (
        (tmp_path / place / "model.safetensors").read_bytes() for place in ("device", "disk")
    )
    assert first == second
    assert not list(tmp_path.glob(".*"))

"""Allocations under prices that are not in proportion to units."""

from __future__ import annotations

import itertools

import pytest
import torch

from liar_ext import InputError
from liar_ext.allocation import ALLOCATIONS, Budget
from liar_ext.allocation import levels as levels_module
from liar_ext.allocation.levels import levels
from liar_ext.allocation.priced import FINEST, asked
from liar_ext.allocation.prices import Prices

# a constant, stairs, a line: what a decoder's FFN and its four KV groups may take
FFN = Prices((1, 8, 16, 24, 32, 48, 64), (3.0, 3.0, 3.5, 5.0, 5.0, 7.5, 8.0))
HEADS = Prices((1, 2, 3, 4), (2.0, 2.25, 3.5, 4.0))
# that bend: a hinge gives 10 of 64 neurons for the price of one, but they are not free
BENT_FFN = Prices((1, 32, 64), (0.5, 2.5, 5.2))
BENT_HEADS = Prices((1, 2, 4), (2.7, 3.1, 4.1))


def finding(survey: str | None, units: int, scale: int, generator) -> torch.Tensor | None:
    def drawn(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    if survey == "levels":
        rising = drawn(len(levels(units)) - 1).sort(descending=True).values
        return scale * torch.cat([rising, torch.zeros(1, dtype=torch.float64)])
    if survey == "besa":
        # as if each Site were alone in its layer
        kept = torch.tensor(levels(units, 16)[::-1], dtype=torch.float64)
        rising = torch.cat(
            [torch.zeros(1, dtype=torch.float64), drawn(len(kept) - 1).sort().values]
        )
        return torch.stack([scale * rising, kept], 1)
    columns = {"scores": 8 * units, "spectra": 7, "influence": 1}
    return None if survey is None else scale * drawn(columns[survey])


def problem(
    name: str, seed: int, layers: int = 4, tables: tuple[Prices, Prices] = (HEADS, FFN)
) -> list[Budget]:
    generator = torch.Generator().manual_seed(seed)
    survey = ALLOCATIONS[name].survey
    made = []
    for layer in range(layers):
        for kind, prices in zip(("heads", "ffn"), tables, strict=True):
            units = prices.units[-1]
            found = finding(survey, units, layer + 1, generator)
            made.append(Budget(kind, units, prices.secant, found, prices))
    return made


def price(budgets: list[Budget], widths: list[float]) -> float:
    return sum(b.price(w) for b, w in zip(budgets, widths, strict=True))


def dense(budgets: list[Budget]) -> float:
    return sum(b.price(b.units) for b in budgets)


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35, 0.55])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_no_other_price_of_a_site_comes_closer_to_the_budget(name, sparsity, round_to):
    for seed in range(3):
        budgets = problem(name, seed)
        widths = ALLOCATIONS[name].widths(budgets, sparsity, round_to)
        target = (1 - sparsity) * dense(budgets)
        found = price(budgets, widths)
        for place, budget in enumerate(budgets):
            step = round_to if budget.kind == "ffn" else 1
            assert step <= widths[place] <= budget.units
            assert widths[place] % step == 0
            if ALLOCATIONS[name].equal:
                continue
            now = budget.price(widths[place])
            others = {budget.price(u) for u in range(step, budget.units + 1, step)}
            for near in (
                max((p for p in others if p < now), default=now),
                min((p for p in others if p > now), default=now),
            ):
                assert abs(found + near - now - target) >= abs(found - target) - 1e-9
        # a stair of the heads is 1.25 wide at most, and four layers move together in uniform
        most = 4 * 1.25 if ALLOCATIONS[name].equal else 1.25
        assert abs(found - target) <= most / 2 + 1e-9


def test_uniform_keeps_equal_widths_and_spends_what_a_stair_leaves():
    budgets = problem("uniform", 0)
    widths = ALLOCATIONS["uniform"].widths(budgets, 0.3)
    assert len(set(widths[::2])) == len(set(widths[1::2])) == 1
    only = [Budget("ffn", 64, FFN.secant, None, FFN)]
    # 0.375 of 8 s go: the stair at 5 s ends with 32 units
    assert ALLOCATIONS["uniform"].widths(only, 0.375) == [32]


@pytest.mark.parametrize("name", ["uniform", "alpha", "influence", "global", "kwon"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_what_is_asked_for_costs_what_the_budget_allows(name, sparsity):
    """The most that fits: of what the allocation answers to slightly less, nothing does."""
    budgets = problem(name, 1)
    wanted = ALLOCATIONS[name].wanted
    most = (1 - sparsity) * dense(budgets)
    found = asked(wanted, budgets, sparsity)
    assert price(budgets, found) <= most * (1 + 1e-9)
    own = [s / 1000 for s in range(1, 1000)]
    answers = [wanted(budgets, s) for s in own]
    fitting = [price(budgets, answer) for answer in answers]
    assert price(budgets, found) >= max(p for p in fitting if p <= most) - 1e-6


@pytest.mark.parametrize("name", ["ranked", "kwon"])
def test_beyond_the_units_of_the_fixed_price_every_site_goes_on_shrinking(name):
    """These answer no fewer than a hinge gives for the price of one unit."""
    budgets = problem(name, 1, tables=(BENT_HEADS, BENT_FFN))
    wanted = ALLOCATIONS[name].wanted
    least = wanted(budgets, 1.0)
    assert least == [b.hinge.free for b in budgets] and max(least) > 5
    bend = 1 - price(budgets, least) / dense(budgets)
    end = 1 - price(budgets, [1.0] * len(budgets)) / dense(budgets)
    asked_for = [bend + (end - bend) * part / 10 for part in range(11)]
    found = [asked(wanted, budgets, sparsity) for sparsity in asked_for]
    assert found[0] == pytest.approx(least, abs=0.01)
    assert found[-1] == pytest.approx([1.0] * len(budgets), abs=0.01)
    for less, more in itertools.pairwise(found):
        assert all(a >= b for a, b in zip(less, more, strict=True))
    for sparsity, widths in zip(asked_for, found, strict=True):
        assert price(budgets, widths) == pytest.approx((1 - sparsity) * dense(budgets), abs=FINEST)
        # the same everywhere, and a step of the grid settles what is left over
        whole = ALLOCATIONS[name].widths(budgets, sparsity)
        assert all(abs(a - b) < 2 for a, b in zip(whole, widths, strict=True))


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_nothing_goes_that_saves_no_time(name, sparsity, round_to):
    level = Prices((1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0))
    budgets = problem(name, 2, tables=(level, FFN))
    widths = ALLOCATIONS[name].widths(budgets, sparsity, round_to)
    assert widths[::2] == [4] * 4
    for budget, kept in zip(budgets, widths, strict=True):
        more = kept + (round_to if budget.kind == "ffn" else 1)
        assert kept == budget.units or budget.price(more) > budget.price(kept)


def test_bisection_meets_a_line_to_a_thousandth_of_a_unit():
    line = Prices((1, 101), (1.0, 101.0))
    budgets = [Budget("ffn", 101, line.secant, None, line)] * 3
    found = asked(ALLOCATIONS["uniform"].wanted, budgets, 0.37)
    assert price(budgets, found) == pytest.approx(0.63 * 303, abs=FINEST)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_what_stays_at_one_unit_cannot_go(name):
    budgets = problem(name, 0)
    most = 1 - 4 * (3.0 + 2.0) / (4 * (8.0 + 4.0))
    with pytest.raises(InputError, match="at most 0.5833 of the measured time can be removed"):
        ALLOCATIONS[name].widths(budgets, 0.6)
    widths = ALLOCATIONS[name].widths(budgets, 0.5833)
    assert price(budgets, widths) == pytest.approx((1 - most) * dense(budgets), rel=1e-3)
    with pytest.raises(InputError, match="multiples of 16, so that at most 0.5416 of the measured"):
        ALLOCATIONS[name].widths(budgets, 0.56, 16)


def test_a_table_in_which_nothing_saves_time_is_no_budget():
    flat = Prices((1, 64), (3.0, 3.0))
    with pytest.raises(InputError, match="no time goes with any unit; measure a larger --batch"):
        ALLOCATIONS["uniform"].widths([Budget("ffn", 64, 0.0, None, flat)], 0.3)


# -- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.55])
@pytest.mark.parametrize("seed", range(4))
def test_no_combination_of_levels_is_better(seed, sparsity):
    """All prices are multiples of a slot: the programme is exact."""
    generator = torch.Generator().manual_seed(seed)
    budgets = []
    for _ in range(4):
        steps = torch.randint(0, 40, (5,), generator=generator).cumsum(0)
        # 1024ths of a second, in stairs where a step is 0
        prices = Prices((1, 2, 3, 4, 5), tuple(((steps + 1) / 1024).tolist()))
        losses = torch.rand(5, generator=generator, dtype=torch.float64).sort(descending=True)
        budgets.append(Budget("ffn", 5, prices.secant, losses.values, prices))
    if sum(b.price(1) for b in budgets) > (1 - sparsity) * dense(budgets):
        return
    slots = int(1024 * sum(b.price(b.units) for b in budgets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels_module, "SLOTS", slots)
        wanted = ALLOCATIONS["levels"].wanted(budgets, sparsity)
    most = (1 - sparsity) * dense(budgets)
    assert price(budgets, wanted) <= most + 1e-12

    def loss(widths) -> float:
        return sum(float(b.known[int(w) - 1]) for b, w in zip(budgets, widths, strict=True))

    best = min(
        loss(widths)
        for widths in itertools.product(range(1, 6), repeat=4)
        if price(budgets, widths) <= most
    )
    assert loss(wanted) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4])
def test_slots_waste_no_more_than_one_for_each_site(sparsity):
    for seed in range(4):
        budgets = problem("levels", seed, layers=1)
        found = ALLOCATIONS["levels"].wanted(budgets, sparsity)
        most = (1 - sparsity) * dense(budgets)
        assert price(budgets, found) <= most + 1e-9
        tried = [levels(b.units) for b in budgets]

        def loss(widths, budgets=budgets, tried=tried) -> float:
            return sum(
                float(b.known[own.index(int(w))])
                for b, w, own in zip(budgets, widths, tried, strict=True)
            )

        less = most - len(budgets) * dense(budgets) / levels_module.SLOTS
        best = min(loss(w) for w in itertools.product(*tried) if price(budgets, w) <= less)
        assert loss(found) <= best + 1e-12


# -- kwon --------------------------------------------------------------------------------------


def hinges(seed: int, kinds: tuple[str, ...]) -> list[Budget]:
    """Two layers of 3 groups of 2 columns, and of 5 neurons, 1 and 2 of them free."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        for kind in kinds:
            units, free, fixed, slope = {"heads": (3, 1, 4.0, 3.5), "ffn": (5, 2, 3.0, 1.0)}[kind]
            prices = Prices(
                tuple(range(1, units + 1)),
                tuple(fixed + slope * max(u - free, 0) for u in range(1, units + 1)),
            )
            columns = 2 * units if kind == "heads" else units
            scores = torch.rand(columns, generator=generator, dtype=torch.float64)
            found = 3 * scores if kind == "heads" else scores
            made.append(Budget(kind, units, prices.secant, found, prices))
    return made


def kept_score(budgets: list[Budget], widths) -> float:
    total = 0.0
    for budget, units in zip(budgets, widths, strict=True):
        scores = budget.known.reshape(budget.units, -1).sum(1).sort(descending=True).values
        total += float(scores[: int(units)].sum())
    return total


@pytest.mark.parametrize("kinds", [("heads", "ffn"), ("ffn",), ("heads",)], ids=",".join)
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.33, 0.45])
@pytest.mark.parametrize("seed", range(5))
def test_kwon_finds_the_most_score_of_all_widths(seed, sparsity, kinds):
    budgets = hinges(seed, kinds)
    most = (1 - sparsity) * dense(budgets)
    if sum(b.price(1) for b in budgets) > most:
        return
    # the best units of a Site are always the ones to keep: widths are all there is to choose
    best = max(
        kept_score(budgets, widths)
        for widths in itertools.product(*(range(1, b.units + 1) for b in budgets))
        if price(budgets, widths) <= most + 1e-9
    )
    for wanted in (
        ALLOCATIONS["kwon"].wanted(budgets, sparsity),
        asked(ALLOCATIONS["kwon"].wanted, budgets, sparsity),
    ):
        assert price(budgets, wanted) <= most + 1e-9
        assert kept_score(budgets, wanted) == pytest.approx(best)


def test_free_units_stay_whatever_they_are_worth():
    budgets = hinges(3, ("ffn",))
    budgets[0] = Budget("ffn", 5, 0.6, torch.full((5,), 1e-9, dtype=torch.float64), FIVE)
    wanted = ALLOCATIONS["kwon"].wanted(budgets, 0.3)
    assert wanted[0] == 2


FIVE = Prices((1, 2, 3, 4, 5), (3.0, 3.0, 4.0, 5.0, 6.0))


def test_a_later_combination_has_the_whole_budget_too():
    """The published loop takes what a combination costs from the budget of all that follow.

    All the score is in the neurons, which only the last combinations of heads and neurons to be
    tried by a loop from few to many neurons can keep.
    """
    heads = Prices((1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0))
    neurons = Prices((1, 2, 3, 4, 5), (1.0, 2.0, 3.0, 4.0, 5.0))
    poor = torch.full((4,), 1e-6, dtype=torch.float64)
    rich = torch.ones(5, dtype=torch.float64)
    for order in (1, -1):
        budgets = [Budget("heads", 4, 1.0, poor, heads), Budget("ffn", 5, 1.0, rich, neurons)]
        widths = ALLOCATIONS["kwon"].wanted(budgets[::order], 1 / 3)[::order]
        assert widths == [1.0, 5.0]

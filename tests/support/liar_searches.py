"""Search problems small enough to try every candidate, and an oracle whose losses do not add up."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from liar_ext.allocation import Budget
from liar_ext.allocation.levels import levels
from liar_ext.allocation.search import Candidate, Problem

# rounding of a sum of prices
SLACK = 1 + 1e-9
# relative error of half the windows; of others it falls as one over the root of their number
NOISE = 0.03


@dataclass(frozen=True)
class Stairs(Budget):
    """A price as latency has it: a part that is always there, and steps of some units."""

    base: float = 0.0
    step: int = 1

    def price(self, units: int) -> float:
        return self.base + 0.1 * self.cost * math.ceil(units / self.step)


class Losses:
    """`Σ a_i d_i^p_i + Σ b_ij d_i d_j` with the removed shares d: more units never hurt.

    A part of the windows adds an error, the same one each time.

    Attributes:
        asked: every candidate with its share, in order.
        most: questions that are answered; further ones raise KeyboardInterrupt.
    """

    def __init__(self, problem: Problem, seed: int, most: float = math.inf) -> None:
        drawn = random.Random(seed)
        self.units = [budget.units for budget in problem.budgets]
        sites = range(len(self.units))
        self.single = [drawn.uniform(0.2, 3) for _ in sites]
        self.power = [drawn.uniform(1, 3) for _ in sites]
        self.pairs = {pair: drawn.uniform(0, 3) for pair in itertools.combinations(sites, 2)}
        self.asked: list[tuple[Candidate, float]] = []
        self.most = most

    def alone(self, site: int, kept: float) -> float:
        return self.single[site] * (1 - kept / self.units[site]) ** self.power[site]

    def of(self, candidate: Candidate) -> float:
        removed = [1 - kept / units for kept, units in zip(candidate, self.units, strict=True)]
        total = sum(self.alone(site, kept) for site, kept in enumerate(candidate))
        return total + sum(b * removed[i] * removed[j] for (i, j), b in self.pairs.items())

    def losses(self, candidates: Sequence[Candidate], share: float = 1.0) -> list[float]:
        found = []
        for candidate in candidates:
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append((candidate, share))
            error = NOISE * math.sqrt(1 / share - 1)
            drawn = random.Random(f"{candidate} {share}").uniform(-error, error)
            found.append(self.of(candidate) * (1 + drawn))
        return found

    @property
    def spent(self) -> float:
        return sum(share for _, share in self.asked)


def problem(
    seed: int,
    sites: int = 4,
    steps: int = 5,
    stairs: bool = False,
    sparsity: float = 0.5,
    evaluations: int = 200,
) -> tuple[Problem, Losses]:
    """FFN and heads by turns, with the errors of each Site alone as findings."""
    drawn = random.Random(seed)
    budgets: list[Budget] = []
    grids = []
    for site in range(sites):
        heads = site % 2 == 1
        units = steps if heads else steps * drawn.choice([2, 3, 5])
        kind, cost = (
            ("heads", 40 + drawn.randrange(3)) if heads else ("ffn", 7 + drawn.randrange(3))
        )
        if stairs:
            step = 1 if heads else drawn.choice([2, 4, 7])
            base = 3.7 * drawn.random()
            budgets.append(Stairs(kind, units, cost, base=base, step=step))
        else:
            budgets.append(Budget(kind, units, cost))
        grids.append(tuple(units * place // steps for place in range(1, steps + 1)))
    bare = Problem(budgets, sparsity, grids, evaluations, seed)
    losses = Losses(bare, seed)
    known = []
    for site, budget in enumerate(budgets):
        errors = [losses.alone(site, kept) for kept in levels(budget.units)]
        finding = torch.tensor(errors, dtype=torch.float64)
        known.append(type(budget)(**{**vars(budget), "finding": finding}))
    return Problem(known, sparsity, grids, evaluations, seed), losses


def within(problem: Problem) -> list[Candidate]:
    """Every candidate that the budget allows."""
    return [
        candidate
        for candidate in itertools.product(*problem.levels)
        if problem.price(candidate) <= problem.most * SLACK
    ]


def is_full(problem: Problem, candidate: Candidate) -> bool:
    """No Site has a next level that fits."""
    for site, (own, kept) in enumerate(zip(problem.levels, candidate, strict=True)):
        place = own.index(kept)
        if place + 1 < len(own):
            raised = [own[place + 1] if s == site else k for s, k in enumerate(candidate)]
            if problem.price(raised) <= problem.most * SLACK:
                return False
    return True

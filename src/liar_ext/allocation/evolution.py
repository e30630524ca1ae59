"""evolution: mutation, crossover and newcomers over widths (Search for Efficient LLMs, 2409.17372).

Of a generation half are mutants of the best, three tenths have two parents among them, and the rest
are newcomers, mutants with the probabilities of the start. The criterion says which units go.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator

from liar_ext.allocation import uniform
from liar_ext.allocation.base import Allocation
from liar_ext.allocation.search import Call, Candidate, Oracle, Problem, in_steps
from liar_ext.allocation.space import Positions, Space
from liar_ext.allocation.trials import Trials

# as published: of a population of 100, in 50 generations
MUTANTS, CROSSED, PARENTS = 0.5, 0.3, 0.1
POPULATION_PER_GENERATION = 2
# P_m and P_s at the start and at the end: a small change of a Site's width, and any
SMALL, ANY = (0.6, 0.3), (0.3, 0.1)
# units that stay the same in a small change
OVERLAP = 0.8


def search(problem: Problem, oracle: Oracle) -> Candidate:
    """Never worse than uniform: it starts there."""
    space = Space(problem)
    trials = Trials(space, oracle)
    generator = np.random.default_rng(problem.seed)
    trials.losses([space.uniform()])
    population = _population(problem.evaluations)
    parents = trials.ranked()

    def chosen() -> Positions:
        return parents[int(generator.integers(len(parents)))]

    def newcomer() -> Positions:
        return mutated(space, chosen(), SMALL[0], ANY[0], generator)

    def mutant() -> Positions:
        done = 1 - trials.left / problem.evaluations
        small, any_ = (start + done * (end - start) for start, end in (SMALL, ANY))
        return mutated(space, chosen(), small, any_, generator)

    def crossed() -> Positions:
        pairs = zip(space.widths(chosen()), space.widths(chosen()), strict=True)
        return space.place([pair[int(generator.integers(2))] for pair in pairs])

    # the first generation are newcomers, as it has one parent
    plan = [(newcomer, population)]
    while trials.left >= 1:
        offspring: dict[Positions, None] = {}
        for draw, count in plan:
            offspring.update(dict.fromkeys(trials.fresh(draw, count)))
        if not offspring:
            break
        trials.losses(list(offspring))
        parents = trials.ranked()[: max(2, round(PARENTS * population))]
        shares = [(mutant, round(MUTANTS * population)), (crossed, round(CROSSED * population))]
        rest = population - sum(count for _, count in shares)
        plan = [*shares, (newcomer, rest)]
    return trials.best()


def mutated(
    space: Space, parent: Positions, small: float, any_: float, generator: Generator
) -> Positions:
    """Every Site's width drawn from all its levels with the probability `any_`, else from those
    near it with `small`; then moved on to the budget."""
    wishes = space.widths(parent)
    for site, own in enumerate(space.levels):
        near = (1 - OVERLAP) * space.units[site]
        if generator.random() < any_:
            options = list(own)
        elif generator.random() < small:
            options = [kept for kept in own if abs(kept - wishes[site]) <= near]
        else:
            continue
        wishes[site] = float(options[int(generator.integers(len(options)))])
    return space.place(wishes)


def _population(evaluations: int) -> int:
    return max(4, round(math.sqrt(POPULATION_PER_GENERATION * evaluations)))


def calls(evaluations: int, sites: int, windows: int) -> list[Call]:
    return in_steps(evaluations, _population(evaluations))


EVOLUTION = Allocation(
    "evolution", uniform.wanted, survey=None, equal=False, search=search, calls=calls
)

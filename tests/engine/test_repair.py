"""Ranks share the output rows of a repair, and end on the same ridge."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from liar_families import FAMILIES

from liar_ext import Recipe
from liar_ext.engine.clock import Clock
from liar_ext.engine.ranks import Ranks
from liar_ext.engine.repair import Repairer
from liar_ext.models import adapter_for
from liar_ext.ops.moments import Moments
from liar_ext.ops.residual import SINGLE_TOLERANCE
from liar_ext.reconstruction import RECONSTRUCTIONS, Task

CPU = torch.device("cpu")


class Pretended(Ranks):
    """One process with a peer that climbs to `first`, and then as high as anybody asks."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.other = first

    def gather(self, value):
        every = [value, self.other]
        self.other = max(every)
        return every


@pytest.fixture
def task() -> Task:
    x = torch.randn(400, 24)
    moments = Moments.zeros(24)
    moments.gram += x.T @ x
    moments.sum += x.sum(0)
    moments.count += 400
    keep = torch.arange(0, 24, 2)
    return Task(moments, torch.randn(7, 24), keep, keep + 1, 1e-4, True, 14)


def repairer(other: float) -> Repairer:
    return Repairer(Recipe(), {"ffn": True}, Pretended(other), Clock(CPU))


def test_ranks_that_agree_solve_once(task):
    found = repairer(1e-4)._agreed(task)
    assert found.diagnostics.ridge_used == 1e-4
    assert found.diagnostics.steps == ()


def test_a_rank_whose_peer_climbed_the_ladder_follows_it(task):
    found = repairer(1e-2)._agreed(task)
    expected = RECONSTRUCTIONS["liar"].repair(dataclasses.replace(task, ridge=1e-2))
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.shift, expected.shift)
    assert (found.diagnostics.ridge, found.diagnostics.ridge_used) == (1e-4, 1e-2)
    assert found.diagnostics.steps == ("ridge 1.0e-02 for all ranks",)


def test_the_rank_that_is_highest_keeps_its_own_result(task):
    high = dataclasses.replace(task, ridge=1e-2)
    found = repairer(1e-4)._agreed(high)
    assert torch.equal(found.weight, RECONSTRUCTIONS["liar"].repair(high).weight)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows_of_all_ranks_are_the_repair_of_all_rows(ranks):
    """Every rank's slice on its own, put together; the residual's energies add up."""
    torch.manual_seed(1)
    model = FAMILIES["llama-mha"].build()
    site = adapter_for(model.config).sites_of(model, 0, ("ffn",))[0]
    x = torch.randn(500, site.columns)
    moments = Moments.zeros(site.columns)
    moments.gram += x.T @ x
    moments.sum += x.sum(0)
    moments.count += 500
    keep = torch.arange(0, site.columns, 2)
    whole, residual, _ = Repairer(Recipe(), {"ffn": False}, Ranks.single(), Clock(CPU))._solve(
        site, moments, keep
    )
    parts, energies = [], torch.zeros(2, dtype=torch.float64)

    class Slice(Ranks):
        def rows(self, total, rank=None):
            return super().rows(total, self.rank)

        def gather_rows(self, part, total):
            parts.append(part)
            return part

        def gather(self, value):
            return [value]

        def sum_(self, tensor):
            energies.add_(tensor)
            return tensor

    for rank in range(ranks):
        mine = Slice()
        mine.rank, mine.size = rank, ranks
        Repairer(Recipe(), {"ffn": False}, mine, Clock(CPU))._solve(site, moments, keep)
    together = torch.cat(parts)
    assert together.shape == whole.weight.shape
    assert float((together - whole.weight).norm() / whole.weight.norm()) < 1e-12
    # its products are float32 where that is known to be enough
    assert float(energies[0] / energies[1]) == pytest.approx(residual, rel=SINGLE_TOLERANCE)

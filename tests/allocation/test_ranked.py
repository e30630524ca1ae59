"""ranked: against a ranking written out, kind by kind."""

from __future__ import annotations

import pytest
import torch

from liar_ext.allocation import ALLOCATIONS, Budget

RANKED = ALLOCATIONS["ranked"]


def problem(seed: int, layers: int = 3) -> list[Budget]:
    """Groups of 2 columns, and neurons; the scales of the layers differ by decades."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int, layer: int) -> torch.Tensor:
        return 10.0**layer * torch.rand(count, generator=generator, dtype=torch.float64)

    made = []
    for layer in range(layers):
        made.append(Budget("heads", 4, 7, drawn(8, layer % 2)))
        made.append(Budget("ffn", 10, 3, drawn(10, layer)))
    return made


def by_hand(budgets: list[Budget], sparsity: float) -> list[int]:
    kept = [0] * len(budgets)
    for kind in ("heads", "ffn"):
        units = []
        for place, budget in enumerate(budgets):
            if budget.kind == kind:
                width = budget.known.numel() // budget.units
                sums = [float(part.sum()) for part in budget.known.split(width)]
                best = max(sums)
                # the best one of a Site is not up for it
                units += [(score == best, score, place) for score in sums]
        units.sort(reverse=True)
        for _, _, place in units[: round((1 - sparsity) * len(units))]:
            kept[place] += 1
    return kept


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_each_kind_keeps_its_best_units_of_all_layers(seed, sparsity):
    budgets = problem(seed)
    assert RANKED.wanted(budgets, sparsity) == by_hand(budgets, sparsity)
    assert RANKED.widths(budgets, sparsity) == by_hand(budgets, sparsity)


def test_each_kind_loses_its_own_share():
    """Whatever the other kind's scores are; `kwon` would take all from the poorer kind."""
    budgets = problem(0)
    poorer = [
        Budget(b.kind, b.units, b.cost, b.known * (1e-9 if b.kind == "ffn" else 1.0))
        for b in budgets
    ]
    for given in (budgets, poorer):
        kept = RANKED.wanted(given, 0.5)
        for kind, count in (("heads", 12), ("ffn", 30)):
            own = [k for k, b in zip(kept, given, strict=True) if b.kind == kind]
            assert sum(own) == count / 2


def test_no_site_is_emptied():
    kept = RANKED.wanted(problem(0), 0.85)
    assert min(kept) == 1

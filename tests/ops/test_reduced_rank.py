"""What a map of low rank can take of an error: moments, the definition, and the map itself."""

from __future__ import annotations

import pytest
import torch

from liar_ext.ops import cross_reference, gram_reference
from liar_ext.ops.reduced_rank import recoverable, recoverable_reference


def draw(tokens, outputs, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(columns, outputs, generator=generator, dtype=torch.float64)
    return mixed + torch.randn(tokens, outputs, generator=generator, dtype=torch.float64), x


@pytest.mark.parametrize("shape", [(101, 7, 13), (67, 17, 5), (9, 4, 23)])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_moments_give_what_the_definition_gives(shape, ridge):
    error, x = draw(*shape)
    gram = gram_reference(x).gram
    # nothing above the diagonal is read
    gram[torch.ones_like(gram).triu(1).bool()] = torch.nan
    found = recoverable(gram, cross_reference(error, x).cross, ridge)
    wanted = recoverable_reference(error, x, ridge)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * float(wanted.max()))
    assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_what_the_best_map_of_that_rank_takes(rank):
    """The best map is the least-squares one, projected on the directions of its largest outputs."""
    error, x = draw(101, 7, 13)
    values = recoverable_reference(error, x, 0.0)
    whole = torch.linalg.lstsq(x, error).solution
    _, _, right = torch.linalg.svd(x @ whole, full_matrices=False)
    best = whole @ right[:rank].T @ right[:rank]
    taken = error.square().sum() - (error - x @ best).square().sum()
    torch.testing.assert_close(values[:rank].sum(), taken, rtol=1e-8, atol=0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        noise = 0.05 * torch.randn(13, rank, generator=generator, dtype=torch.float64)
        other = best + noise @ right[:rank]
        assert (error - x @ other).square().sum() > (error - x @ best).square().sum()


def test_inputs_or_errors_of_nothing_have_nothing_to_give():
    _, x = draw(50, 3, 4)
    zeros = torch.zeros(4, 4), torch.zeros(3, 4)
    assert recoverable(*zeros, 1e-3).tolist() == [0.0] * 3
    gram = gram_reference(x).gram
    assert recoverable(gram, torch.zeros(3, 4), 1e-3).tolist() == [0.0] * 3


def test_columns_that_are_copies_climb_the_ridge():
    error, x = draw(50, 3, 4)
    twice = torch.cat([x, x], 1)
    found = recoverable(gram_reference(twice).gram, cross_reference(error, twice).cross, 0.0)
    wanted = recoverable_reference(error, x, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))

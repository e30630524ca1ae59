"""How alike last hidden states are, against torch text by text."""

from __future__ import annotations

import pytest
import torch

from liar_ext.depth.similarity import similarities

LENGTHS = (5, 3, 1)


def states():
    h, k = torch.randn(2, len(LENGTHS), 5, 7)
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    return h, k, mask


def test_flat_is_the_cosine_of_all_tokens_of_a_text():
    h, k, mask = states()
    found = similarities("flat", h, k, mask)
    expected = [
        torch.cosine_similarity(h[i, :t].double().flatten(), k[i, :t].double().flatten(), dim=0)
        for i, t in enumerate(LENGTHS)
    ]
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)


def test_token_is_the_mean_of_the_cosines_of_a_texts_tokens():
    h, k, mask = states()
    found = similarities("token", h, k, mask)
    expected = [
        torch.cosine_similarity(h[i, :t].double(), k[i, :t].double(), dim=1).mean()
        for i, t in enumerate(LENGTHS)
    ]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)


@pytest.mark.parametrize("kind", ["flat", "token"])
def test_padding_does_not_count_whatever_is_there(kind):
    h, k, mask = states()
    expected = similarities(kind, h, k, mask)
    for poison in (torch.nan, torch.inf, 1e30):
        poisoned = [x.masked_fill(~mask.unsqueeze(2), poison) for x in (h, k)]
        assert torch.equal(similarities(kind, *poisoned, mask), expected)


@pytest.mark.parametrize("kind", ["flat", "token"])
def test_one_is_the_most_and_broken_states_are_not_a_number(kind):
    h, _, mask = states()
    assert float(similarities(kind, h, h, mask).max()) <= 1.0
    assert torch.allclose(similarities(kind, h, 3 * h, mask), torch.ones(3, dtype=torch.float64))
    k = h.clone()
    k[1, 2, 3] = torch.nan
    found = similarities(kind, h, k, mask)
    assert found.isnan().tolist() == [False, True, False]
    assert similarities(kind, h, torch.zeros_like(h), mask).isnan().all()

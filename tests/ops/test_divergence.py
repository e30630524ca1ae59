"""The divergence of next-token distributions where a head rules tokens out."""

from __future__ import annotations

import math

import torch
from torch import nn

from liar_ext.ops.divergence import divergence


def test_tokens_that_are_impossible_add_nothing():
    """A vocabulary with two padded rows has the divergence of the one without."""
    torch.manual_seed(0)
    head, padded = nn.Linear(8, 11), nn.Linear(8, 13)
    dense, pruned = torch.randn(2, 6, 8)
    with torch.no_grad():
        padded.weight[:11], padded.bias[:11] = head.weight, head.bias
        padded.bias[11:] = -math.inf
        expected = divergence(head, dense, pruned)
        found = divergence(padded, dense, pruned)
    assert float(expected) > 0
    assert torch.allclose(found, expected, rtol=1e-6)


def test_a_token_that_only_the_pruned_model_rules_out_is_infinitely_far():
    head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        # the last logit overflows for the second state
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 3e38]]))
        dense, pruned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, -10.0]])
        assert float(divergence(head, dense, pruned)) == math.inf
        assert math.isfinite(float(divergence(head, pruned, dense)))

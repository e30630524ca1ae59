"""How far a model's last hidden states have gone from those of the dense one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liar_ext.ops.logits import chunks, logits


def divergence(head: nn.Module, dense: Tensor, pruned: Tensor) -> Tensor:
    """`Σ KL(p_dense ‖ p_pruned)` of the next-token distributions, in nats, () float64.

    Over the whole vocabulary; logits of a chunk of positions at a time. A token that the dense
    model rules out (a logit of −∞, as rows of a padded vocabulary have) adds 0.

    Args:
        head: makes logits of hidden states; dense, pruned: (tokens, d), what it is given.
    """
    total = torch.zeros((), dtype=torch.float64, device=dense.device)
    for rows in chunks(head, len(dense)):
        p, q = (logits(head, states[rows]).log_softmax(1) for states in (dense, pruned))
        terms = F.kl_div(q, p, reduction="none", log_target=True)
        total += terms.masked_fill_(p == -torch.inf, 0.0).sum(1).double().sum()
    return total


def distances(dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ ‖h_pruned − h_dense‖²` and `Σ ‖h_dense‖²` over (tokens, d) states, () float64 each."""
    wanted = dense.double()
    return (pruned.double() - wanted).square().sum(), wanted.square().sum()

"""How far a model's last hidden states have gone from those of the dense one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liar_ext.models import linear

# float32 logits of one chunk, twice: 128 MiB each
CHUNK_LOGITS = 1 << 25


def divergence(head: nn.Module, dense: Tensor, pruned: Tensor) -> Tensor:
    """`Σ KL(p_dense ‖ p_pruned)` of the next-token distributions, in nats, () float64.

    Over the whole vocabulary; logits of a chunk of positions at a time. A token that the dense
    model rules out (a logit of −∞, as rows of a padded vocabulary have) adds 0.

    Args:
        head: makes logits of hidden states; dense, pruned: (tokens, d), what it is given.
    """
    total = torch.zeros((), dtype=torch.float64, device=dense.device)
    step = max(1, CHUNK_LOGITS // linear.weight(head).shape[0])
    for start in range(0, len(dense), step):
        p, q = (
            _log_probabilities(head, states[start : start + step]) for states in (dense, pruned)
        )
        terms = F.kl_div(q, p, reduction="none", log_target=True)
        total += terms.masked_fill_(p == -torch.inf, 0.0).sum(1).double().sum()
    return total


def _log_probabilities(head: nn.Module, states: Tensor) -> Tensor:
    logits = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def distances(dense: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ ‖h_pruned − h_dense‖²` and `Σ ‖h_dense‖²` over (tokens, d) states, () float64 each."""
    wanted = dense.double()
    return (pruned.double() - wanted).square().sum(), wanted.square().sum()

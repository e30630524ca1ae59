"""How alike two models' last hidden states are: a cosine for each text, padding left out.

`flat` is LaCo's (arXiv 2402.11187): all tokens of a text as one vector, so that tokens with large
norms, as the first one often is, decide. `token` is the mean of the tokens' own cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("flat", "token")


def similarities(kind: str, wanted: Tensor, found: Tensor, mask: Tensor) -> Tensor:
    """One number for each text, (b,) float64, in [−1, 1]; NaN where states are zero or not finite.

    `flat`: `Σ_t h_t·h'_t / √(Σ_t ‖h_t‖² Σ_t ‖h'_t‖²)`; `token`: `1/T Σ_t cos(h_t, h'_t)`; t over
    the T valid tokens.

    Args:
        wanted, found: (b, t, d) hidden states; mask: (b, t) bool, True for valid tokens.
    """
    here = mask.unsqueeze(2)
    # what stands in the place of padding may be anything, NaN too
    h, k = (states.double().masked_fill(~here, 0.0) for states in (wanted, found))
    products = [(x * y).sum(2) for x, y in ((h, k), (h, h), (k, k))]
    if kind == "flat":
        dot, left, right = (product.sum(1) for product in products)
        return (dot / (left * right).sqrt()).clamp(-1.0, 1.0)
    dot, left, right = products
    cosines = (dot / (left * right).sqrt()).clamp(-1.0, 1.0)
    return torch.where(mask, cosines, 0.0).sum(1) / mask.sum(1)

"""What gradients of a loss say of the units of a Site.

A gate `m_u = 1` on a unit multiplies its columns of the consumer's input, so its gradient needs no
weights; those of the single weights are the outer products of what a linear is given and what the
loss makes of what it gives. With `L_x` the loss of example x and `δ = ∂L_x/∂y`:

    gate       ∂L_x/∂m_u = Σ_t Σ_{j∈u} x_tj · ∂L_x/∂x_tj
    weights    g = 1/N Σ_x G_x,   F = 1/N Σ_x G_x²,   G_x = Σ_t δ_t x_tᵀ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# sums over the weights of a row: LLM-Pruner's element-wise and vector-wise importances
TAYLOR_FORMS = ("vector", "first", "second", "mixed")
# rows that are in float64 at a time
_ROWS = 512


@dataclass(frozen=True)
class UnitGradients:
    """Of one Site.

    Attributes:
        gates: (examples, units) float64, `∂L_x/∂m_u`.
        taylor: (units,) float64 for each of `TAYLOR_FORMS`; empty where nobody asked.
    """

    gates: Tensor
    taylor: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> UnitGradients:
        return UnitGradients(
            self.gates.to(device), {form: sums.to(device) for form, sums in self.taylor.items()}
        )


def gate_gradients(
    x: Tensor, gradient: Tensor, columns_per_unit: int, mask: Tensor | None = None
) -> Tensor:
    """Gradients with respect to a gate on each unit, example by example.

    Args:
        x: what the consumer was given, (b, t, n); gradient: of the loss with respect to it.
        mask: (b, t) bool, False for padding.
    Returns:
        (b, n / columns_per_unit) float64. Products are float32 at least, sums float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    products = x.to(wide) * gradient.to(wide)
    if mask is not None:
        # not by a product: what padding computes may be NaN
        products = products.masked_fill_(~mask[..., None], 0.0)
    columns = products.sum(1, dtype=torch.float64)
    return columns.reshape(x.shape[0], -1, columns_per_unit).sum(2)


class WeightGradients:
    """Sums over examples of the gradient of a linear's weight, and of its squares.

    Attributes:
        total, squares: (out, in) `Σ_x G_x` and `Σ_x G_x²`.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self.squares = torch.zeros_like(self.total)

    def add(self, x: Tensor, gradient: Tensor, scale: Tensor, mask: Tensor | None = None) -> None:
        """Add examples.

        Args:
            x: what the linear was given, (b, t, in); gradient: with respect to what it gave,
                (b, t, out).
            scale: (b,), what each example's gradient is multiplied by.
            mask: (b, t) bool, False for padding.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        for number, factor in enumerate(scale.tolist()):
            rows, deltas = x[number], gradient[number]
            if mask is not None:
                rows, deltas = rows[mask[number]], deltas[mask[number]]
            own = torch.mm(deltas.to(wide).T, rows.to(wide)).mul_(factor)
            self.total += own
            self.squares += own.square_()


def taylor_sums(weight: Tensor, gradient: Tensor, fisher: Tensor) -> dict[str, Tensor]:
    """LLM-Pruner's importances of the rows of a weight (arXiv 2305.11627, eq. 3 to 5, and code).

        vector |Σ_j w g|     first Σ_j |w g|     second Σ_j w² F     mixed Σ_j |w g − ½ w² F|

    Args:
        weight: (rows, columns); gradient: g, its mean over the examples; fisher: F, the mean of
            the squares of single examples.
    Returns:
        (rows,) float64 for each of `TAYLOR_FORMS`.
    """
    parts: dict[str, list[Tensor]] = {form: [] for form in TAYLOR_FORMS}
    for start in range(0, weight.shape[0], _ROWS):
        w, g, f = (v[start : start + _ROWS].double() for v in (weight, gradient, fisher))
        first, second = w * g, w.square() * f
        parts["vector"].append(first.sum(1).abs())
        parts["first"].append(first.abs().sum(1))
        parts["second"].append(second.sum(1))
        parts["mixed"].append((first - second / 2).abs_().sum(1))
    return {form: torch.cat(found) for form, found in parts.items()}

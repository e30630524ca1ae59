"""LESA's predictor: a small network from the coefficients of two layers to those between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liar_ext.errors import InputError


@dataclass(frozen=True)
class MlpOptions:
    """How the network learns.

    Attributes:
        epochs: passes over all rows of all triples of layers.
        norm_weight: λ of the loss.
        learning_rate, batch_size: of AdamW, in rows; hidden: widths of the two hidden layers.
    """

    epochs: int
    norm_weight: float
    learning_rate: float = 1e-3
    batch_size: int = 64
    hidden: int = 256

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"--epochs {self.epochs}: must be at least 1")


# LESA (arXiv 2502.13794): what the paper states, and what its repository's notebook has
HYPER_PARAMETERS = {
    "paper": MlpOptions(epochs=5, norm_weight=5e-5),
    "code": MlpOptions(epochs=10, norm_weight=5e-4),
}


def lesa_loss(predicted: Tensor, wanted: Tensor, norm_weight: float) -> Tensor:
    """`(1 − λ) mean((V̂ − V)²) + λ (‖V̂‖_F − ‖V‖_F)²` of rows (n, in).

    The first term alone shrinks what cannot be predicted towards zero; the second one asks for the
    norm of a layer's weights. It is of the rows of a batch together.
    """
    error = (predicted - wanted).square().mean()
    norms = torch.linalg.matrix_norm(predicted) - torch.linalg.matrix_norm(wanted)
    return (1 - norm_weight) * error + norm_weight * norms.square()


class MlpPredictor:
    """`V_new = G([V_below ; V_above])`, row by row.

    Attributes:
        facts: `relative_error`, that of the rows it has learned from: 1 is what predicting zero
            has; and `steps`.
    """

    def __init__(self, network: nn.Module, facts: dict[str, Any]) -> None:
        self._network = network
        self.facts = facts

    @torch.no_grad()
    def __call__(self, below: Tensor, above: Tensor) -> Tensor:
        return self._network(torch.cat((below, above), 1).float())


def fit_mlp(
    coefficients: Tensor, centres: Sequence[int], options: MlpOptions, seed: int
) -> MlpPredictor:
    """Learn V_i from V_{i−1} and V_{i+1}; every row of every triple is a sample.

    The layers it learns from are two apart, those it is used between are one apart: so in LESA.

    Args:
        coefficients: V (layers, r, in), on the device to compute on; centres: the layers i, by
            their place there.
        seed: of the first weights and of the order, the same on every device.
    Source:
        LESA (Yang et al., 2025, arXiv 2502.13794), Section 3; 2 · in → 256 → 256 → in, ReLU.
    """
    _, rows, width = coefficients.shape
    device = coefficients.device
    generator = torch.Generator().manual_seed(seed)
    network = _network(width, options.hidden, generator).to(device)
    middle = torch.tensor(centres, device=device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.learning_rate)
    steps = 0
    for _ in range(options.epochs):
        order = torch.randperm(len(centres) * rows, generator=generator)
        for batch in order.to(device).split(options.batch_size):
            place, row = middle[batch // rows], batch % rows
            beside = coefficients[place - 1, row], coefficients[place + 1, row]
            given, wanted = torch.cat(beside, 1).float(), coefficients[place, row].float()
            with torch.enable_grad():
                loss = lesa_loss(network(given), wanted, options.norm_weight)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
    found = MlpPredictor(network, {})
    error = energy = 0.0
    for centre in centres:
        wanted = coefficients[centre].float()
        predicted = found(coefficients[centre - 1], coefficients[centre + 1])
        error += float((predicted - wanted).double().square().sum())
        energy += float(wanted.double().square().sum())
    found.facts = {"relative_error": error / max(energy, 1e-300), "steps": steps}
    return found


def _network(width: int, hidden: int, generator: torch.Generator) -> nn.Module:
    """With the first weights that `nn.Linear` makes, from a generator of its own."""
    # skipped: making them as usual would draw from the generator of the process
    first, second, last = (
        nn.utils.skip_init(nn.Linear, *sizes)
        for sizes in ((2 * width, hidden), (hidden, hidden), (hidden, width))
    )
    network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    with torch.no_grad():
        for parameter, bound in _bounds(network):
            parameter.uniform_(-bound, bound, generator=generator)
    return network


def _bounds(network: nn.Sequential) -> list[tuple[nn.Parameter, float]]:
    """U(−1/√n, 1/√n) for n inputs, weights and biases."""
    linears = [module for module in network if isinstance(module, nn.Linear)]
    return [(p, linear.in_features**-0.5) for linear in linears for p in linear.parameters()]

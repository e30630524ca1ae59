"""What an inserted layer is made of: LESA's predictor, another one, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from liar_ext.depth.grow.mlp import MlpOptions, fit_mlp
from liar_ext.depth.grow.ridge import fit_ridge


class Fitted(Protocol):
    """V of a new layer from those beside it, (r, in) each; and what is to be said of the fit."""

    facts: dict[str, Any]

    def __call__(self, below: Tensor, above: Tensor) -> Tensor: ...


# coefficients (layers, r, in), places of those between two others to learn from, options, seed
Fit = Callable[[Tensor, Sequence[int], MlpOptions, int], Fitted]


@dataclass(frozen=True)
class Predictor:
    """One way to make a layer.

    Attributes:
        name: as the command line has it; summary: for people.
        fit: learns to predict coefficients; None: matrices are combined as they are.
        scaled: predicted matrices get the mean norm (Frobenius) of their neighbours.
        average: the mean of both neighbours for what is not predicted, else the layer below.
        silent: what its attention and FFN add to the residual stream is set to zero.
    """

    name: str
    summary: str
    fit: Fit | None = None
    scaled: bool = False
    average: bool = True
    silent: bool = False


def mean(below: Tensor, above: Tensor) -> Tensor:
    """The mean of two tensors, rounded once, in the dtype of the first.

    Biases and norms are made so where matrices are predicted: they grow and shrink with depth, and
    what a new layer is given is between what its neighbours are given. LESA's repository leaves
    those of layer 0, which its new modules are copies of.
    """
    return ((below.double() + above.double()) / 2).to(below.dtype)


PREDICTORS: dict[str, Predictor] = {
    predictor.name: predictor
    for predictor in (
        Predictor(
            "mlp",
            "LESA: a network learns the coefficients of a layer from its two neighbours'",
            fit_mlp,
        ),
        Predictor(
            "ridge",
            "the same by ridge regression, λ chosen on layers that were left out",
            lambda coefficients, centres, options, seed: fit_ridge(coefficients, centres),
            # squared error alone leaves next to nothing of what cannot be predicted, and a layer
            # of tiny weights is slow to train; LESA's loss has a term for it
            scaled=True,
        ),
        Predictor("average", "the mean of the two neighbours"),
        # SOLAR (arXiv 2312.15166) repeats a block of layers, here each is repeated by itself
        Predictor("copy", "the layer below once more", average=False),
        # LLaMA-Pro (arXiv 2401.02415): the grown model computes what the dense one does
        Predictor(
            "identity",
            "the layer below once more, silenced until it is trained",
            average=False,
            silent=True,
        ),
    )
}

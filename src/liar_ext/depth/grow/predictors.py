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
        name: as the command line has it; made: what the model card says of the new layers.
        fit: learns to predict coefficients; None: matrices are combined as they are.
        scaled: predicted matrices get the mean norm (Frobenius) of their neighbours.
        average: the mean of both neighbours for what is not predicted, else the layer below.
        silent: what its attention and FFN add to the residual stream is set to zero.
    """

    name: str
    made: str
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
            "Their matrices were predicted from those of the two layers beside them by a small "
            "network that had learned to predict layers of this model (LESA, arXiv 2502.13794); "
            "biases and norms began as the means of theirs.",
            fit_mlp,
        ),
        Predictor(
            "ridge",
            "Their matrices were predicted from those of the two layers beside them by ridge "
            "regression fitted to the layers of this model, in the basis of LESA (arXiv "
            "2502.13794), and scaled to their norms; biases and norms began as the means of "
            "theirs.",
            lambda coefficients, centres, options, seed: fit_ridge(coefficients, centres),
            # squared error alone leaves next to nothing of what cannot be predicted, and a layer
            # of tiny weights is slow to train; LESA's loss has a term for it
            scaled=True,
        ),
        Predictor("average", "They began as the means of the two layers beside them."),
        # SOLAR (arXiv 2312.15166) repeats a block of layers, here each is repeated by itself
        Predictor("copy", "They began as copies of the layers below them.", average=False),
        # LLaMA-Pro (arXiv 2401.02415): the grown model computes what the dense one does
        Predictor(
            "identity",
            "They began as copies of the layers below them that add nothing to the residual "
            "stream, so that the model computed what the one that it was made from does.",
            average=False,
            silent=True,
        ),
    )
}

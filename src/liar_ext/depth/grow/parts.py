"""What a layer is made of, by its own parameters: matrices to predict, vectors to average."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from liar_ext.errors import InputError


@dataclass(frozen=True)
class Matrix:
    """A matrix that every layer has.

    Attributes:
        name: in the layer.
        transposed: stored as (in, out), as in GPT-2's `Conv1D`.
    """

    name: str
    transposed: bool

    def oriented(self, stored: Tensor) -> Tensor:
        """Stored to (out, in), and back: a view."""
        return stored.T if self.transposed else stored


def matrices_of(layer: nn.Module) -> list[Matrix]:
    """All matrices of a layer, in its order; works on `meta`.

    Raises:
        InputError: a parameter has more than two dimensions, as stacked experts have.
    """
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 2:
            raise InputError(
                f"{name} has shape {tuple(parameter.shape)}: only layers of matrices and vectors "
                "can be grown, not mixtures of experts"
            )
        if parameter.dim() == 2:
            owner = layer.get_submodule(name.rpartition(".")[0])
            found.append(Matrix(name, isinstance(owner, Conv1D)))
    return found


def vectors_of(layer: nn.Module) -> list[str]:
    """Biases, norms and what else has one number for each channel, in the layer's order."""
    return [name for name, parameter in layer.named_parameters() if parameter.dim() < 2]

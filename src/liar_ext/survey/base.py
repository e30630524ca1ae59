"""Survey: what an allocation wants to know of every Site before it decides; one pass, layer by
layer, over the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from liar_ext.criteria import Criterion, Evidence
from liar_ext.models.site import Site

# what of a layer is looked at: `weights` need no tokens; `columns` and `moments` are statistics of
# its Sites' inputs; `states` are the hidden states that enter and leave it
Reads = Literal["weights", "columns", "moments", "states"]


@dataclass(frozen=True)
class View:
    """What a survey sees of one Site.

    Attributes:
        site: the Site, dense, in an open layer (`site.module`); criterion: the recipe's.
        evidence: with the statistics that the survey reads, for `columns` and `moments`.
        similarity: mean cosine of the hidden states that enter and leave the layer, for `states`.
    """

    site: Site
    criterion: Criterion
    evidence: Evidence | None = None
    similarity: float | None = None

    @property
    def judged(self) -> Evidence:
        """The evidence, of a survey that reads statistics of Sites."""
        assert self.evidence is not None, "the engine supplies what a survey reads"
        return self.evidence


class Block(Protocol):
    """A dense layer between what enters it and what leaves it, on all calibration batches.

    What it answers is the same on every rank, to the bit. Gates are (units,) on the CPU, one for
    each of the layer's targeted Sites in order.

    Attributes: `units` of those Sites, `costs` of one unit of each, as the recipe's budget counts;
    `batches`, how many there are.
    """

    units: Sequence[int]
    costs: Sequence[float]
    batches: int

    def slopes(self, trials: Sequence[Trial]) -> list[list[Tensor]]:
        """Gradients of a batch's error with respect to the gates, (units,) float64 each."""

    def errors(self, gates: Sequence[Sequence[Tensor]]) -> list[float]:
        """The error of the layer's output over all batches, for each set of gates."""


# the number of a batch, and gates
Trial = tuple[int, Sequence[Tensor]]
Learn = Callable[[Sequence[Tensor], Block], Tensor]


@dataclass(frozen=True)
class Survey:
    """Attributes:
    name: as allocations name it; label: what progress calls the pass.
    reads: the recipe's criterion -> what of a layer the finding is made from.
    measure: View -> the finding, a float64 tensor of any shape.
    whole_layer: the finding is one of the layer, the same for all of its Sites.
    costs: a dense Site and the criterion -> FLOPs of `measure`, and the most bytes it holds.
    learn: what `measure` found of a layer's Sites, and the layer -> the finding of all of them,
        which takes the place of theirs; None where nothing is learned.
    passes: how many forwards of one batch, and of all batches, `learn` takes for so many Sites.
    """

    name: str
    label: str
    reads: Callable[[Criterion], Reads]
    measure: Callable[[View], Tensor]
    whole_layer: bool
    costs: Callable[[Site, Criterion], tuple[int, int]]
    learn: Learn | None = None
    passes: Callable[[int], tuple[int, int]] = lambda sites: (0, 0)

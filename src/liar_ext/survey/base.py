"""Survey: what an allocation wants to know of every Site before it decides; one pass, layer by
layer, over the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
        evidence: with the statistics that the survey reads, if any.
        similarity: mean cosine of the hidden states that enter and leave the layer, for `states`.
    """

    site: Site
    criterion: Criterion
    evidence: Evidence
    similarity: float | None = None


@dataclass(frozen=True)
class Survey:
    """Attributes:
    name: as allocations name it; label: what progress calls the pass.
    reads: the recipe's criterion -> what of a layer the finding is made from.
    measure: View -> the finding, a float64 tensor of any shape.
    whole_layer: the finding is one of the layer, the same for all of its Sites.
    costs: a dense Site and the criterion -> FLOPs of `measure`, and the most bytes it holds.
    """

    name: str
    label: str
    reads: Callable[[Criterion], Reads]
    measure: Callable[[View], Tensor]
    whole_layer: bool
    costs: Callable[[Site, Criterion], tuple[int, int]]

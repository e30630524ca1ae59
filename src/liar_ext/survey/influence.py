"""influence: how much a layer turns its hidden states, `1 − E cos(x_in, x_out)`.

Block influence of ShortGPT (arXiv 2403.03853, eq. 1), which MoDeGPT (2408.09632) allocates by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liar_ext.criteria import Criterion
from liar_ext.models.site import Site
from liar_ext.survey.base import Reads, Survey, View


def reads(criterion: Criterion) -> Reads:
    return "states"


def measure(view: View) -> Tensor:
    """(1,): the layer's block influence, 0 to 2."""
    assert view.similarity is not None, "the engine supplies what a survey reads"
    return torch.tensor([1.0 - view.similarity], dtype=torch.float64)


def costs(site: Site, criterion: Criterion) -> tuple[int, int]:
    return 0, 0


INFLUENCE = Survey(
    "influence", "measuring influence", reads, measure, whole_layer=True, costs=costs
)

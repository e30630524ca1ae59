"""scores: the criterion's scores of a Site's columns or units, on the dense path."""

from __future__ import annotations

from torch import Tensor

from liar_ext.criteria import Criterion
from liar_ext.models.site import Site
from liar_ext.survey.base import Reads, Survey, View


def reads(criterion: Criterion) -> Reads:
    if criterion.needs in ("columns", "moments"):
        return criterion.needs
    # gradients come from a pass of their own
    return "weights"


def measure(view: View) -> Tensor:
    """(columns,) or (units,), whichever the criterion scores."""
    return view.criterion.score(view.evidence)


def costs(site: Site, criterion: Criterion) -> tuple[int, int]:
    # all units go, or would: nobody knows yet how many
    sizes = site.columns, site.weight().shape[0], site.columns
    return criterion.flops(*sizes), criterion.holds(*sizes)


SCORES = Survey("scores", "scoring", reads, measure, whole_layer=False, costs=costs)

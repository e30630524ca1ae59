"""scores: the criterion's scores of a Site's columns or units, on the dense path."""

from __future__ import annotations

from torch import Tensor

from liar_ext.criteria import Criterion
from liar_ext.models.site import Site
from liar_ext.ops.removal import removal_bytes
from liar_ext.survey.base import Reads, Survey, View


def reads(criterion: Criterion) -> Reads:
    return criterion.needs


def measure(view: View) -> Tensor:
    """(columns,) or (units,), whichever the criterion scores."""
    return view.criterion.score(view.judged)


def costs(site: Site, criterion: Criterion) -> tuple[int, int]:
    # column scores are nothing beside a forward; what reads Moments inverts them
    if criterion.needs == "columns":
        return 0, 0
    return site.columns**3, removal_bytes(site.columns, site.weight().shape[0])


SCORES = Survey("scores", "scoring", reads, measure, whole_layer=False, costs=costs)

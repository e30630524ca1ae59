"""What a survey finds of one layer, put where an interrupted run finds it again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liar_ext.criteria import Columns
from liar_ext.engine.block import LayerBlock
from liar_ext.engine.keeper import Position
from liar_ext.engine.repair import Repairer
from liar_ext.models import Site
from liar_ext.survey import Learn, Survey


def find(
    survey: Survey,
    sites: Sequence[Site],
    statistics: dict[str, Columns],
    similarity: float | None,
    repairer: Repairer,
    position: Position,
) -> None:
    """Findings of a layer's Sites; the statistics of each are freed after it."""
    whole: Tensor | None = None
    for site in sites:
        key = site.layer, site.kind
        if whole is None:
            own = statistics.pop(site.kind, None)
            found, notes = repairer.finding(survey, site, own, similarity)
            del own
            position.notes[key] = [f"survey: {note}" for note in notes]
        else:
            # files do not take two tensors of one storage
            found = whole.clone()
        position.findings[key] = found
        whole = found if survey.whole_layer else None


def learn(rule: Learn, block: LayerBlock, position: Position) -> None:
    """What a layer's Sites learn together takes the place of what was found of each."""
    keys = [(site.layer, site.kind) for site in block.sites]
    whole = rule([position.findings[key] for key in keys], block)
    for key in keys:
        position.findings[key] = whole.clone()
